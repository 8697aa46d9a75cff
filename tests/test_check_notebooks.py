"""The notebook check itself, on a small notebook in a real kernel: what is wrong is found, what is skipped is left alone, nothing gets out."""
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

pytest.importorskip("nbclient")
import check_notebooks  # noqa: E402


def cell(source, printed=None):
    return new_code_cell(source, outputs=[new_output("stream", name="stdout", text=printed)] if printed else [])


def run(tmp_path, monkeypatch, *cells):
    path = tmp_path / "10_toy.ipynb"
    nbformat.write(new_notebook(cells=list(cells), metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}), path)
    before = path.read_bytes()
    monkeypatch.setenv("JUPYTER_PATH", check_notebooks.kernel_folder(tmp_path / "jupyter"))
    result = check_notebooks.execute(path, 1, tmp_path)
    assert path.read_bytes() == before, "the check writes nothing back"
    return result


def test_equal_noisy_skipped_and_wrong_outputs(tmp_path, monkeypatch):
    seconds, error, found = run(
        tmp_path, monkeypatch,
        cell("print('accuracy', 70.4)", "accuracy 70.0\n"),
        cell("#| slow\nraise RuntimeError('never executed')", "kept 1\n"),
        cell("#| eval: false\nnothing_of_this_name", "kept 2\n"),
        cell("import os; print(os.environ['OMP_NUM_THREADS'])", "1\n"),
        cell("#| tolerance: 5\nprint(12)", "9\n"),
        cell("print('planted', 3)", "planted 4\n"),
        cell("import socket\ntry: socket.create_connection(('192.0.2.1', 80), 1)\nexcept OSError as error: print('blocked' in str(error))", "True\n"),
    )
    assert error is None and seconds > 0
    assert [(number, line) for number, line, _ in found] == [(5, "print('planted', 3)")]


def test_an_error_in_a_cell_is_reported(tmp_path, monkeypatch):
    _, error, _ = run(tmp_path, monkeypatch, cell("1 / 0"))
    assert "ZeroDivisionError" in error


def test_a_late_chapter_fails(monkeypatch, capsys):
    page = check_notebooks.NOTEBOOKS / "20_clip.ipynb"
    assert check_notebooks.report(page, check_notebooks.CHAPTER_SECONDS - 1, None, [])
    assert not check_notebooks.report(page, check_notebooks.CHAPTER_SECONDS + 1, None, [])
    assert check_notebooks.report(check_notebooks.NOTEBOOKS / "05_measure.ipynb", check_notebooks.CHAPTER_SECONDS + 1, None, [])
    assert "PROMPTBOOK_CHAPTER_SECONDS" in capsys.readouterr().out
