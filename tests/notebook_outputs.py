"""Compare a notebook's committed outputs with those of a fresh run.

Text between the numbers must be equal; numbers must agree within a tolerance; pictures must be there.
The tolerance of the whole book is stated here, once:

- whole numbers (counts, shapes, sizes) must be equal;
- a number with a decimal point or an exponent may differ by 5 % of its size, by 0.005, or by one unit of the last
  digit it is printed with, whichever is largest. An accuracy of 70.0 may thus move by 3.5 points.

A code cell can ask for something else in its directives:

- `#| tolerance: 4`    every number in its outputs, whole ones too, may differ by 4 (the usual rule still helps)
- `#| tolerance: 20%`  the same, by 20 % of its size
- `#| volatile`        its text is not compared (timings, words that rounding decides); its kinds of output still are
"""
import math
import re

RELATIVE = 0.05
ABSOLUTE = 0.005
SKIP_FLAGS = {"slow", "gpu", "notest"}  # tst_flags of settings.ini; such cells keep their committed outputs

NUMBER = re.compile(r"(?<![A-Za-z0-9_.])(?:(?<![)\]])[-+−])?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?(?![A-Za-z]*\d)")
ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")


def directives(source):
    """The nbdev directives at the head of a cell, as {name: value}; `#| eval: false` gives {"eval": "false"}."""
    found = {}
    for line in source.splitlines():
        line = line.strip()
        if not line:
            continue
        if not line.startswith("#|"):
            break
        name, _, value = line[2:].strip().partition(":")
        words = name.split()
        if not words:
            continue
        found[words[0]] = (value or " ".join(words[1:])).strip()
    return found


def is_skipped(source):
    """Whether a cell is not executed by the check."""
    flags = directives(source)
    return flags.get("eval", "").lower() == "false" or bool(SKIP_FLAGS & flags.keys())


def tolerance_of(source):
    """(absolute, relative) that a cell asks for beyond the usual rule; (0, 0) if it asks for nothing."""
    value = directives(source).get("tolerance")
    if value is None:
        return 0.0, 0.0
    try:
        return (0.0, float(value[:-1]) / 100) if value.endswith("%") else (float(value), 0.0)
    except ValueError:
        raise ValueError(f"`#| tolerance: {value}` is neither a number nor a percentage") from None


def split_numbers(text):
    """`text` without its numbers (white space collapsed), and the numbers as printed."""
    text = ADDRESS.sub("0xADDRESS", ESCAPE.sub("", text))
    # a progress bar rewrites its line: only what is left standing counts
    text = "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in text.split("\n"))
    numbers = NUMBER.findall(text)
    rest = NUMBER.sub("#", text)
    # padding, rules and the sign's column depend on how wide the numbers are
    rest = re.sub(r"[-─═]{3,}", "---", rest)
    return " ".join(rest.split()), numbers


def close(old, new, absolute=0.0, relative=0.0):
    """Whether two printed numbers agree. `absolute` and `relative` are what the cell asks for."""
    def parse(text):
        plain = text.replace(",", "").replace("−", "-")
        mantissa, _, exponent = plain.lower().partition("e")
        digits = len(mantissa.partition(".")[2])
        whole = "." not in plain and not exponent
        return float(plain), whole, 10.0 ** (int(exponent or 0) - digits)

    (a, whole_a, unit_a), (b, whole_b, unit_b) = parse(old), parse(new)
    if a == b:
        return True
    size = max(abs(a), abs(b))
    allowed = max(absolute, relative * size)
    if not (whole_a and whole_b):
        allowed = max(allowed, RELATIVE * size, ABSOLUTE, max(unit_a, unit_b))
    return abs(a - b) <= allowed * (1 + 1e-9) and not math.isnan(a - b)


def compare_text(old, new, absolute=0.0, relative=0.0):
    """None if the texts agree, else one sentence about the first difference."""
    (old_text, old_numbers), (new_text, new_numbers) = split_numbers(old), split_numbers(new)
    if old_text != new_text:
        at = next((i for i, (x, y) in enumerate(zip(old_text, new_text)) if x != y), min(len(old_text), len(new_text)))
        start = max(0, at - 30)
        return f"text differs: committed …{old_text[start:at + 40]!r}, fresh …{new_text[start:at + 40]!r}"
    for position, (x, y) in enumerate(zip(old_numbers, new_numbers), 1):
        if not close(x, y, absolute, relative):
            return f"number {position} differs: committed {x}, fresh {y}"
    return None


def joined(value):
    """nbformat keeps long strings as lists of lines in the file."""
    return "".join(value) if isinstance(value, list) else value


def summary(outputs):
    """A cell's outputs as (stdout text, [text of each display], [kind of each picture])."""
    printed, shown, pictures = "", [], []
    for output in outputs:
        kind = output["output_type"]
        if kind == "stream":
            if output["name"] == "stdout":
                printed += joined(output["text"])
        elif kind == "error":
            shown.append(f"{output['ename']}: {output['evalue']}")
        else:
            data = output.get("data", {})
            kinds = sorted(k for k in data if k.startswith("image/"))
            pictures += kinds
            if kinds:
                continue  # beside a picture the text is only <Figure size …>
            plain = joined(data.get("text/plain", ""))
            if re.fullmatch(r"<[\w.]+ ?(object|at 0x\w+)?>|<IPython[^>]*>", plain.strip()):
                for richer in ("text/markdown", "text/latex", "text/html"):
                    if richer in data:
                        plain = joined(data[richer])
                        pictures += ["inline"] * len(re.findall(r"<(?:img|svg)\b", plain))
                        plain = re.sub(r"<svg\b.*?</svg>|<style\b.*?</style>|<script\b.*?</script>", " ", plain, flags=re.S)
                        plain = re.sub(r"<[^>]*>", " ", plain)
                        break
            shown.append(plain)
    return printed, shown, pictures


def compare_cell(source, old_outputs, new_outputs):
    """The differences between a cell's committed and fresh outputs, one sentence each."""
    old_printed, old_shown, old_pictures = summary(old_outputs)
    new_printed, new_shown, new_pictures = summary(new_outputs)
    found = []
    if old_pictures != new_pictures:
        found.append(f"pictures differ: committed {old_pictures}, fresh {new_pictures}")
    if len(old_shown) != len(new_shown):
        found.append(f"committed {len(old_shown)} displayed results, fresh {len(new_shown)}")
    if bool(old_printed.strip()) != bool(new_printed.strip()):
        found.append(f"committed printed text {old_printed[:60]!r}, fresh {new_printed[:60]!r}")
    if found or "volatile" in directives(source):
        return found
    absolute, relative = tolerance_of(source)
    for old, new in [(old_printed, new_printed), *zip(old_shown, new_shown)]:
        difference = compare_text(old, new, absolute, relative)
        if difference:
            found.append(difference)
    return found


def compare_notebooks(old, new):
    """All differences between two runs of one notebook: [(cell number, first line, sentence)]."""
    found = []
    for number, (a, b) in enumerate(zip(old["cells"], new["cells"])):
        source = joined(a["source"])
        if a["cell_type"] != "code" or is_skipped(source):
            continue
        first = next((line for line in source.splitlines() if line.strip() and not line.startswith("#|")), "")
        found += [(number, first[:70], sentence) for sentence in compare_cell(source, a["outputs"], b["outputs"])]
    return found
