"""Prompts inside language models: what must hold for any weights."""
import copy
import json
from dataclasses import replace
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from promptbook.lm import (Combined, DeepPrompts, LanguageModel, LMPrompts, LMSource, PrefixMemory, PromptedLM, ScriptedModel, SoftPrompt, TextPairs, Trie, collate, encode, fold,
                           from_peft, model_blocks, random_backbone, show_input, to_peft, tokenise, vocabulary_rows, word_rows)
from promptbook.measure import tensor_hash

KINDS = ("llama", "gpt2", "bloom", "t5", "bert")
CAUSAL, GENERATING = KINDS[:3], KINDS[:4]
SOURCES = ["what colour is the star ?", "copy : red"]
TARGETS = ["blue", "red"]


@pytest.fixture(scope="module")
def models():
    return {name: random_backbone(name) for name in KINDS}


class Offset(LMSource):
    def __init__(self, backbone, length=24, scale=.5):
        super().__init__()
        self.table = nn.Parameter(torch.randn(length, backbone.width) * scale)

    def forward(self, batch=None, embeddings=None): return LMPrompts(offset=self.table)


class Generated(LMSource):
    """Rows of every layer from the mean of the instruction's states there."""
    def __init__(self, backbone, length=2):
        super().__init__()
        self.length, self.width, self.seen = length, backbone.width, []
        self.up = nn.Linear(backbone.width, length * backbone.width)

    def rows(self, layer, states, instruction):
        assert states.dtype == torch.float32
        mean = (states * instruction[..., None]).sum(1) / instruction.sum(1, keepdim=True)
        rows = self.up(mean).view(-1, self.length, self.width)
        self.seen.append(rows.detach())
        return rows

    def forward(self, batch=None, embeddings=None): return LMPrompts(prepend=torch.zeros(self.length, self.width), layers=self.rows)


class Conditioned(LMSource):
    """A soft prompt from the mean embedding of the text."""
    def __init__(self, backbone, length=2):
        super().__init__()
        self.length, self.up = length, nn.Linear(backbone.width, length * backbone.width)

    def forward(self, batch=None, embeddings=None):
        mean = (embeddings.float() * batch.instruction[..., None]).sum(1) / batch.instruction.sum(1, keepdim=True)
        return LMPrompts(prepend=self.up(mean).view(len(batch), self.length, -1))


MAKERS = {"none": lambda b: None, "soft": lambda b: SoftPrompt(b, 3), "deep": lambda b: DeepPrompts(b, 3, std=1.), "memory": lambda b: PrefixMemory(b, 3, std=1.),
          "offset": lambda b: Combined(prompt=SoftPrompt(b, 2), table=Offset(b)), "generated": Generated, "conditioned": Conditioned,
          "decoder": lambda b: SoftPrompt(b, 2, decoder=2), "everything": lambda b: Combined(deep=DeepPrompts(b, 2, std=1.), table=Offset(b), memory=PrefixMemory(b, 3, std=1.))}


def make(backbone, kind, **options):
    torch.manual_seed(3)
    return PromptedLM(backbone, MAKERS[kind](backbone), **options)


def cases(kinds):
    return [(name, kind) for name in kinds for kind in MAKERS if not (kind == "decoder" and name != "t5" or name == "bert" and kind in ("memory", "everything"))]


# batches

def words(backbone, ids): return backbone.tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("side", ["right", "left"])
def test_labels_are_the_response_only(models, side):
    batch = encode(models["llama"], SOURCES, TARGETS, side=side)
    for k in range(2):
        counted = batch.labels[k] != -100
        assert words(models["llama"], batch.labels[k][counted]) == [TARGETS[k], "[EOS]"]
        assert torch.equal(batch.ids[k][counted], batch.labels[k][counted])
        assert not (batch.instruction[k] & counted).any() and torch.equal(batch.instruction[k] | counted, batch.mask[k].bool())
    assert batch.mask[1, 0 if side == "left" else -1] == 0 and batch.mask[1, -1 if side == "left" else 0] == 1


def test_causal_sources_have_no_end_mark_and_others_keep_it(models):
    assert words(models["llama"], encode(models["llama"], ["red"]).ids[0]) == ["[SOS]", "red"]
    assert words(models["bert"], encode(models["bert"], ["red"]).ids[0]) == ["[SOS]", "red", "[EOS]"]
    both = encode(models["t5"], SOURCES, TARGETS, side="left")
    assert words(models["t5"], both.ids[0])[-1] == "[EOS]" and both.labels.shape == (2, 2) and both.mask[1, 0] == 0
    assert words(models["llama"], encode(models["llama"], ["red"], ["blue"], end=False).ids[0]) == ["[SOS]", "red", "blue"]


def test_fixed_length_roles_and_token_ids(models):
    llama = models["llama"]
    assert encode(llama, SOURCES, length=20).ids.shape == (2, 20)
    batch = encode(llama, [[("colour", 1), ("red star", 2)], [("red", 2)]], [[("blue", 4)], [("red", 4)]], side="left")
    assert batch.roles.tolist() == [[0, 1, 2, 2, 4, 0], [0, 0, 0, 2, 4, 0]]
    ids = llama.tokenizer("red star", add_special_tokens=False).input_ids
    assert encode(llama, [ids]).ids.tolist() == encode(llama, ["red star"], marks=False).ids.tolist() == [ids]
    assert PromptedLM(llama, marks=False).encode(["red star"]).ids.tolist() == [ids]


def test_errors_of_batches_name_what_is_wrong(models):
    llama = models["llama"]
    for wrong, words_ in ((lambda: encode(llama, ["red", ""]), "has no tokens"), (lambda: encode(llama, ["red"], [""]), "target '' has no tokens"), (lambda: encode(llama, []), "list of texts is empty"),
                          (lambda: encode(llama, "red"), "not one string"), (lambda: encode(llama, ["red"], ["a", "b"]), "1 sources but 2 targets"),
                          (lambda: encode(llama, ["star " * 90], reserve=10), "text of 91 tokens, a prompt of 10 do not fit into the 96 positions of 'random llama'"),
                          (lambda: encode(llama, ["red blue green"], length=2), "fixed length is 2"), (lambda: encode(llama, ["red"], side="middle"), "side must be"),
                          (lambda: encode(models["bert"], ["red"], ["blue"]), "is an encoder")):
        with pytest.raises(ValueError, match=words_): wrong()


def test_a_tokenizer_with_other_ids_is_refused(models):
    big = copy.copy(models["llama"])
    model = copy.deepcopy(models["llama"].model)
    model.resize_token_embeddings(20)
    object.__setattr__(big, "model", model)                          # the backbone's own check is tested in test_zoo
    with pytest.raises(ValueError, match="do not match: the token .* has id .*, the model's embedding table has 20 rows"): encode(big, ["red star"])


def test_prompt_and_text_longer_than_the_context(models):
    method = PromptedLM(models["gpt2"], SoftPrompt(models["gpt2"], 60))
    with pytest.raises(ValueError, match="text of 41 tokens, a prompt of 60 do not fit into the 96"): method.encode(["star " * 40])
    batch = encode(models["gpt2"], ["star " * 40])
    with pytest.raises(ValueError, match="a prompt of 60 do not fit"): method(batch)
    with pytest.raises(ValueError, match="a prompt of 60 and 30 new tokens do not fit"): method.generate(["star " * 10], 30)
    memory = PromptedLM(models["gpt2"], PrefixMemory(models["gpt2"], 60))
    with pytest.raises(ValueError, match="a prompt of 60 do not fit"): memory.encode(["star " * 40])
    with pytest.raises(ValueError, match="offset table has 3 rows, the text 8 tokens"): PromptedLM(models["gpt2"], Offset(models["gpt2"], 3))(encode(models["gpt2"], ["star " * 7]))


# what prompts are

@pytest.mark.parametrize("name", CAUSAL)
def test_a_prompt_of_words_is_those_words(models, name):
    b, text = models[name], "what colour is the"
    tok = lambda x: b.tokenizer(x, add_special_tokens=False).input_ids
    whole = b.model(input_ids=torch.tensor([tok(text + " small red star")])).logits[:, -3:]
    batch = collate(b, tokenise(b, ["small red star"], marks=False))
    for source in (SoftPrompt(b, words=text), PrefixMemory(b, words=text)):
        assert torch.allclose(PromptedLM(b, source)(batch)["logits"], whole, atol=1e-4)


@pytest.mark.parametrize("name", GENERATING)
def test_without_a_source_it_is_the_model(models, name):
    b = models[name]
    batch = encode(b, SOURCES, TARGETS)
    if name == "t5": reference = b.model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels)
    else: reference = b.model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels)
    ours = PromptedLM(b)(batch)
    assert torch.allclose(ours["logits"][batch.mask.bool()] if name != "t5" else ours["logits"], reference.logits[batch.mask.bool()] if name != "t5" else reference.logits, atol=1e-5)
    assert abs(ours["loss"] - reference.loss) < 1e-5


def read(method, batch, k):
    out = method(batch)
    if method.backbone.kind == "encoder": return out["states"][k][batch.mask[k].bool()]
    return out["logits"][k][(batch.labels[k] != -100) if method.backbone.kind == "seq2seq" else batch.mask[k].bool()]


@pytest.mark.parametrize("name,kind", cases(KINDS))
def test_padding_changes_nothing(models, name, kind):
    b = models[name]
    targets = None if name == "bert" else TARGETS
    for side in ("right", "left"):
        method = make(b, kind)
        alone, beside, longer = (encode(b, s, targets and t, side=side, length=n) for s, t, n in ((SOURCES[1:], TARGETS[1:], None), (SOURCES, TARGETS, None), (SOURCES[1:], TARGETS[1:], 20)))
        reference = read(method, alone, 0)
        assert (read(method, beside, 1) - reference).abs().max() < 1e-4 and (read(method, longer, 0) - reference).abs().max() < 1e-4


def test_the_offset_table_follows_the_source(models):
    b, n = models["llama"], 4
    table = Offset(b)
    for side in ("right", "left"):
        for targets in (None, ["one two"]):
            batch = encode(b, ["copy : red"], targets, side=side, length=12)
            difference = PromptedLM(b, table).assemble(batch).embeddings - PromptedLM(b).assemble(batch).embeddings
            assert torch.allclose(difference[0][batch.instruction[0]], table.table[:n] if side == "right" else table.table[-n:], atol=1e-6)
            assert not difference[0][~batch.instruction[0]].any(), "response and padding get nothing"
    class Everywhere(Offset):
        def forward(self, batch=None, embeddings=None): return LMPrompts(offset=self.table, offset_response=True)
    batch = encode(b, ["copy : red"], ["one two"], side="left", length=12)
    difference = PromptedLM(b, Everywhere(b)).assemble(batch).embeddings - PromptedLM(b).assemble(batch).embeddings
    assert difference[0][batch.mask[0].bool()].any(1).all()
    moved = PromptedLM(b, table).assemble(encode(b, SOURCES, side="right"), side="left")
    assert torch.allclose(moved.embeddings[1][moved.mask[1].bool()], PromptedLM(b, table).assemble(encode(b, SOURCES[1:])).embeddings[0])
    zero = Offset(b, scale=0.)
    assert torch.equal(PromptedLM(b, zero)(encode(b, SOURCES))["logits"], PromptedLM(b)(encode(b, SOURCES))["logits"])


@pytest.mark.parametrize("name,kind", [c for c in cases(GENERATING)])
def test_greedy_tokens_with_cache_are_those_without(models, name, kind):
    for side in ("right", "left"):
        method = make(models[name], kind, side=side)
        fast, slow = (method.generate(SOURCES, 6, use_cache=u).ids for u in (True, False))
        assert torch.equal(fast, slow)
        alone = method.generate(SOURCES[1:], 6).ids[0]
        same = min(len(alone), fast.shape[1])
        assert torch.equal(fast[1][:same], alone[:same])


@pytest.mark.parametrize("name", KINDS)
def test_deep_prompts_replace_rows_layer_by_layer(models, name):
    b = models[name]
    torch.manual_seed(0)
    source, batch = DeepPrompts(b, 2, std=1.), encode(b, SOURCES, None if name == "bert" else TARGETS)
    seen = []
    handles = [block.register_forward_hook(lambda m, args, out: seen.append(args[0][:, :2].clone())) for block in model_blocks(b)]
    PromptedLM(b, source)(batch)
    for h in handles: h.remove()
    for j in range(1, len(seen)): assert torch.allclose(seen[j], source.vectors[j].expand(2, -1, -1))
    assert not torch.allclose(read(PromptedLM(b, source), batch, 0), read(PromptedLM(b, DeepPrompts(b, 2, depth=1)), batch, 0), atol=1e-3)
    with pytest.raises(ValueError, match="fit into 1 to 3 layers"): DeepPrompts(b, 2, depth=9)


def test_hooks_are_never_left_behind(models):
    b = models["llama"]
    class Broken(Generated):
        def rows(self, layer, states, instruction):
            if layer == 1: raise RuntimeError("broken")
            return super().rows(layer, states, instruction)
    method = PromptedLM(b, Broken(b))
    for act in (lambda: method(encode(b, SOURCES)), lambda: method.generate(SOURCES, 2), lambda: method.score(SOURCES, ["red"])):
        with pytest.raises(RuntimeError, match="broken"): act()
        assert not any(block._forward_pre_hooks for block in model_blocks(b))
    class Uneven(Generated):
        def rows(self, layer, states, instruction): return torch.zeros(layer + 2, self.width)
    with pytest.raises(ValueError, match="Layer 1 got 3 rows for a prompt of 2"): PromptedLM(b, Uneven(b))(encode(b, SOURCES))


def test_generators_never_see_the_response(models):
    b = models["llama"]
    torch.manual_seed(0)
    source = Generated(b)
    seen = {}
    for target in ("blue", "one two three"):
        source.seen.clear()
        PromptedLM(b, source, side="left")(encode(b, SOURCES[:1], [target], side="left"))
        seen[target] = torch.stack(source.seen)
    assert torch.allclose(seen["blue"], seen["one two three"], atol=1e-5)
    source.seen.clear()
    PromptedLM(b, source).generate(SOURCES[:1], 5)
    assert len(source.seen) == 3, "generators run in the prefill only"
    assert torch.allclose(torch.stack(source.seen), seen["blue"], atol=1e-5)


def test_every_user_may_have_prompts_of_their_own(models):
    b = models["llama"]
    torch.manual_seed(0)
    users = [LMPrompts(prepend=vocabulary_rows(b, 2), layers=[None, torch.randn(2, b.width)], memory=PrefixMemory(b, 3, std=1.)().memory, offset=Offset(b)().offset) for _ in range(2)]
    stacked = LMPrompts(prepend=torch.stack([u.prepend for u in users]), layers=[None, torch.stack([u.layers[1] for u in users])], offset=torch.stack([u.offset for u in users]),
                        memory=[tuple(torch.stack([u.memory[j][i] for u in users]) for i in range(2)) for j in range(3)])
    class Given(LMSource):
        def __init__(self, prompts): super().__init__(); self.prompts = prompts
        def forward(self, batch=None, embeddings=None): return self.prompts
    together = PromptedLM(b, Given(stacked))
    for k in range(2):
        alone = PromptedLM(b, Given(users[k]))
        batch = encode(b, SOURCES)
        assert torch.allclose(together(batch)["logits"][k][batch.mask[k].bool()], alone(encode(b, SOURCES[k:k + 1]))["logits"][0], atol=1e-4)
        assert torch.allclose(together.score(SOURCES, ["red star", "blue"]).total[k], alone.score(SOURCES[k:k + 1], ["red star", "blue"]).total[0], atol=1e-4)


def test_combining_and_folding(models):
    b = models["llama"]
    torch.manual_seed(0)
    both = Combined(first=SoftPrompt(b, 2), second=SoftPrompt(b, 3), table=Offset(b))
    assert both().rows == 5 and set(both.groups()) == {"first", "second", "table"}
    with pytest.raises(ValueError, match="Two of the combined sources bring 'offset'"): Combined(a=Offset(b), b=Offset(b))()
    for source in (both, PrefixMemory(b, 3, hidden=8, std=1.), DeepPrompts(b, 2)):
        folded = fold(source)
        assert not list(folded.parameters()) and torch.equal(PromptedLM(b, folded)(encode(b, SOURCES))["logits"], PromptedLM(b, source)(encode(b, SOURCES))["logits"])
    assert fold(both).to(torch.bfloat16)().prepend.dtype == torch.float32
    for source in (Conditioned(b), Generated(b)):
        with pytest.raises(ValueError, match="cannot be folded"): fold(source)


def test_starting_values(models):
    b = models["llama"]
    assert torch.equal(SoftPrompt(b, 5, words="red star").vectors[:4], word_rows(b, "red star red star"))
    table = b.model.get_input_embeddings().weight
    assert all((table == row).all(1).any() for row in vocabulary_rows(b, 6))
    assert SoftPrompt(b, 400, std=.5).vectors.std().item() == pytest.approx(.5, rel=.1)
    for wrong in (lambda: SoftPrompt(b), lambda: SoftPrompt(b, 0), lambda: SoftPrompt(b, 3, rows=torch.zeros(2, b.width)), lambda: PrefixMemory(b), lambda: PrefixMemory(models["bert"], 2),
                  lambda: PrefixMemory(models["t5"], words="red")):
        with pytest.raises(ValueError): wrong()


# objective

@pytest.mark.parametrize("side", ["right", "left"])
def test_loss_by_hand(models, side):
    b = models["llama"]
    batch, method = encode(b, SOURCES, TARGETS, side=side), make(models["llama"], "soft")
    out, losses = method(batch), []
    for k in range(2):
        logs = out["logits"][k].log_softmax(-1)
        losses += [-logs[t - 1, batch.labels[k, t]] for t in range(batch.ids.shape[1]) if batch.labels[k, t] != -100]
    assert torch.allclose(out["loss"], torch.stack(losses).mean(), atol=1e-5) and out["loss"].dtype == torch.float32
    with pytest.raises(ValueError, match="No label counts"): method(replace(batch, labels=torch.full_like(batch.labels, -100)))


def test_prompt_rows_with_labels_and_weights(models):
    b = models["llama"]
    ids = torch.tensor(b.tokenizer("red star blue", add_special_tokens=False).input_ids)
    class Context(LMSource):
        def __init__(self): super().__init__(); self.rows = nn.Parameter(word_rows(b, "red star blue"))
        def forward(self, batch=None, embeddings=None): return LMPrompts(prepend=self.rows, labels=torch.tensor([-100, -100, ids[2]]), weights=torch.tensor([1., 1., .25]))
    batch = encode(b, SOURCES, TARGETS, end=False)
    made = PromptedLM(b, Context()).assemble(batch)
    logits = PromptedLM(b, Context())._run(made, LMPrompts()).logits.log_softmax(-1)
    terms = [-.25 * logits[k, 1, ids[2]] for k in range(2)] + [-logits[k, t - 1, made.labels[k, t]] for k in range(2) for t in range(3, made.labels.shape[1]) if made.labels[k, t] != -100]
    assert torch.allclose(PromptedLM(b, Context())(batch)["loss"], torch.stack(terms).mean(), atol=1e-5) and len(terms) == 4


@pytest.mark.parametrize("name", KINDS)
def test_head_reads_the_state_of_a_real_token(models, name):
    b = models[name]
    torch.manual_seed(0)
    head = nn.Linear(b.width, 5, bias=False)
    for readout in ("last", "first", "mean"):
        results = []
        for side in ("right", "left"):
            method = PromptedLM(b, SoftPrompt(b, rows=torch.ones(2, b.width) * .1), head, side=side, readout=readout)
            both = method(method.encode(SOURCES, classes=torch.tensor([0, 3])))
            alone = method(method.encode(SOURCES[1:]))
            assert both["logits"].shape == (2, 5) and "loss" not in alone and torch.allclose(both["logits"][1], alone["logits"][0], atol=1e-4)
            results.append(both["logits"])
        assert torch.allclose(*results, atol=1e-4)
    classes = torch.tensor([[1., 0, 0, 1, 0], [0, 0, 0, 0, 0]])
    out = method(method.encode(SOURCES, classes=classes))
    assert torch.allclose(out["loss"], F.binary_cross_entropy_with_logits(out["logits"], classes))
    assert set(method.groups()) == {"prompt", "head"}
    with pytest.raises(ValueError, match="readout must be"): PromptedLM(b, None, head, readout="all")


def test_last_state_of_a_causal_model_by_hand(models):
    b = models["llama"]
    head = nn.Linear(b.width, 3)
    states = b.model.model(input_ids=encode(b, SOURCES[1:]).ids).last_hidden_state[:, -1]
    method = PromptedLM(b, None, head)
    assert torch.allclose(method(method.encode(SOURCES))["logits"][1:], head(states), atol=1e-5)


def test_decoder_rows_of_t5_by_hand(models):
    b = models["t5"]
    torch.manual_seed(0)
    source = SoftPrompt(b, 2, decoder=2)
    batch = encode(b, SOURCES, TARGETS)
    table = b.model.get_input_embeddings()
    embeddings = torch.cat([source.vectors.expand(2, -1, -1), table(batch.ids)], 1)
    decoder = torch.cat([source.decoder.expand(2, -1, -1), table(b.model.prepare_decoder_input_ids_from_labels(batch.labels))], 1)
    reference = b.model(inputs_embeds=embeddings, attention_mask=F.pad(batch.mask, (2, 0), value=1), decoder_inputs_embeds=decoder).logits[:, 2:]
    assert torch.allclose(PromptedLM(b, source)(batch)["logits"], reference, atol=1e-4)


@pytest.mark.parametrize("name,kind", cases(KINDS))
def test_training_changes_prompts_only(models, name, kind):
    if kind == "none": pytest.skip("nothing to train")
    b, before = models[name], tensor_hash(models[name].model)
    method = make(b, kind).train()
    assert not method.lm.training
    train = [p for p in method.parameters() if p.requires_grad]
    assert {id(p) for g in method.groups().values() for p in g} == {id(p) for p in train}
    assert all(p.dtype == torch.float32 for p in train) and not any(n.startswith(method.backbone_prefix) for n, p in method.named_parameters() if p.requires_grad)
    old = [p.detach().clone() for p in train]
    optimizer = torch.optim.AdamW(train, lr=.01)
    out = method(method.encode(SOURCES, None if name == "bert" else TARGETS))
    (out["states"].square().mean() if name == "bert" else out["loss"]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in train) and all(p.grad is None for p in method.lm.parameters())
    optimizer.step()
    assert all(not torch.equal(p, o) for p, o in zip(train, old)) and tensor_hash(b.model) == before


@pytest.mark.parametrize("name,kind", cases(KINDS))
def test_half_precision_models_keep_fp32_prompts(models, name, kind):
    method = make(models[name], kind)
    full = method.encode(SOURCES, None if name == "bert" else TARGETS)
    reference = method(full)
    method.lower_precision(torch.bfloat16)
    out = method(full)
    assert models[name].model.dtype == torch.float32 and method.lm.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for n, p in method.named_parameters() if p.requires_grad)
    key = "states" if name == "bert" else "logits"
    assert out[key].dtype == torch.bfloat16 and (out[key].float() - reference[key]).abs().mean() < .2 * reference[key].abs().mean() + .05
    if name != "bert": assert out["loss"].dtype == torch.float32 and method.generate(SOURCES, 2).ids.shape[0] == 2


def test_batches_for_training(models):
    method = make(models["llama"], "soft", side="left")
    pairs = TextPairs(method, SOURCES * 3, TARGETS * 3)
    batches = list(DataLoader(pairs, 4, collate_fn=lambda batch: batch))
    assert [len(b) for b in batches] == [4, 2] and batches[0].side == "left" and torch.equal(batches[0].ids[:2], method.encode(SOURCES, TARGETS).ids)
    class Split: sources, targets = SOURCES, TARGETS
    assert method(method.training_set(Split())[0])["loss"] > 0
    headed = PromptedLM(models["llama"], None, nn.Linear(32, 2))
    class Labelled: sources, classes = SOURCES, torch.tensor([0, 1])
    assert headed.training_set(Labelled()).__getitems__([1]).classes.tolist() == [1]
    with pytest.raises(ValueError, match="2 texts but 1 class labels"): TextPairs(headed, SOURCES, classes=[0])


# decoding and scoring

def test_sampling_stopping_and_constraints(models):
    method = make(models["llama"], "soft")
    a, b = (method.generate(SOURCES, 5, n=3, temperature=1.5, seed=1) for _ in range(2))
    assert torch.equal(a.ids, b.ids) and len(a.texts) == 6 and len(set(a.texts[:3])) > 1
    state = torch.get_rng_state()
    method.generate(SOURCES, 2, temperature=1., seed=7)
    assert torch.equal(state, torch.get_rng_state()), "a seed of its own leaves torch's generator alone"
    greedy = method.generate(SOURCES[:1], 6)
    first = greedy.texts[0].split()[0]
    assert torch.equal(method.generate(SOURCES[:1], 6, temperature=1., top_p=1e-6, seed=0).ids, greedy.ids)
    stopped = method.generate(SOURCES[:1], 6, stop=first)
    assert stopped.texts == [""] and stopped.counts == [1] and stopped.ids.shape[1] == 1
    for use_cache in (True, False):
        assert method.generate(SOURCES, 3, constraint=lambda row, ids: [50 + len(ids)], use_cache=use_cache).ids.tolist() == [[50, 51, 52]] * 2
    with pytest.raises(ValueError, match="same text n times"): method.generate(SOURCES, 2, n=2)
    with pytest.raises(ValueError, match="is an encoder"): make(models["bert"], "soft").generate(SOURCES)


@pytest.mark.parametrize("name,kind", cases(GENERATING))
def test_scores_are_the_loss_of_forward(models, name, kind):
    continuations = ["red star", "blue", "one two three"]
    for side in ("right", "left"):
        method = make(models[name], kind, side=side)
        scores = method.score(SOURCES, continuations)
        assert scores.counts.tolist() == [[2, 1, 3]] * 2 and torch.allclose(scores.mean * scores.counts, scores.total)
        for k in range(2):
            for c, text in enumerate(continuations):
                with torch.no_grad(): loss = method(method.encode(SOURCES[k:k + 1], [text], end=False))["loss"]
                assert abs(scores.total[k, c] + loss * scores.counts[k, c]) < 1e-3
        with torch.no_grad(): closed = method(method.encode(SOURCES[:1], ["blue"]))["loss"]
        assert abs(method.score(SOURCES, continuations, end=True).total[0, 1] + 2 * closed) < 1e-3


def test_scores_for_lists_and_errors(models):
    method = make(models["llama"], "memory")
    own = method.score(SOURCES, [["red", "blue star"], ["one", "two"]])
    assert torch.allclose(own.total[1], method.score(SOURCES[1:], ["one", "two"]).total[0], atol=1e-4)
    assert torch.allclose(own.total[:, :1], torch.stack([method.score(SOURCES, ["red"]).total[0], method.score(SOURCES, ["one"]).total[1]]), atol=1e-4)
    for wrong, words_ in (([], "continuations is empty"), ([[], []], "non-empty list"), ([["a"]], "for all 2 texts"), ([["a"], ["a", "b"]], "equal length"), (["red", ""], "has no tokens")):
        with pytest.raises(ValueError, match=words_): method.score(SOURCES, wrong)


# PEFT

@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("kind", ["soft", "memory", "mlp"])
def test_parity_and_exchange_with_peft(models, name, kind, tmp_path):
    peft, b = pytest.importorskip("peft"), models[name]
    torch.manual_seed(0)
    source = {"soft": lambda: SoftPrompt(b, 4), "memory": lambda: PrefixMemory(b, 4, std=1.), "mlp": lambda: PrefixMemory(b, 4, hidden=8, std=1.)}[kind]()
    method, batch = PromptedLM(b, source), encode(b, SOURCES)
    real = batch.mask.bool()
    logits = lambda model: model(input_ids=batch.ids, attention_mask=batch.mask).logits[:, -batch.ids.shape[1]:]
    with torch.no_grad():
        ours = method(batch)["logits"]
        to_peft(method, tmp_path / "ours")
        theirs = logits(peft.PeftModel.from_pretrained(copy.deepcopy(b.model), tmp_path / "ours"))
        assert (ours - theirs)[real].abs().max() < 1e-5 and (ours - PromptedLM(b)(batch)["logits"])[real].abs().max() > 1e-2
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4) if kind == "soft" else peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prefix_projection=False)
        model = peft.get_peft_model(copy.deepcopy(b.model), config).eval()
        model.save_pretrained(tmp_path / "theirs")
        assert (PromptedLM(b, from_peft(tmp_path / "theirs", b))(batch)["logits"] - logits(model))[real].abs().max() < 1e-5
        assert torch.equal(PromptedLM(b, from_peft(tmp_path / "ours", b))(batch)["logits"], ours)


def test_peft_on_t5(models, tmp_path):
    peft, b = pytest.importorskip("peft"), models["t5"]             # three layers: an odd number, so that PEFT's prefixes can be sorted out
    torch.manual_seed(0)
    batch = encode(b, SOURCES, TARGETS)
    with torch.no_grad():
        soft = PromptedLM(b, SoftPrompt(b, 4))
        to_peft(soft, tmp_path)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(b.model), tmp_path)
        assert (theirs(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).logits - soft(batch)["logits"]).abs().max() < 1e-5
        model = peft.get_peft_model(copy.deepcopy(b.model), peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)).eval()
        table, ours = model.prompt_encoder["default"].embedding.weight.view(4, 6, 32), PrefixMemory(b, 4)
        order = [(4 * layer + i) % 6 for layer in range(3) for i in range(2)]
        ours.vectors.copy_(table[:, order].flatten(1))
        assert (PromptedLM(b, ours)(batch)["logits"] - model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).logits).abs().max() < 1e-5
    with pytest.raises(ValueError, match="each other's prefixes"): to_peft(PromptedLM(b, ours), tmp_path / "no")


def test_peft_wastes_half_of_a_prefix_on_an_even_t5(models):
    peft = pytest.importorskip("peft")
    b = random_backbone("t5", layers=4)
    batch = encode(b, SOURCES, TARGETS)
    model = peft.get_peft_model(copy.deepcopy(b.model), peft.PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4)).eval()
    model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).loss.backward()
    assert (model.prompt_encoder["default"].embedding.weight.grad == 0).float().mean() == .5
    ours = PrefixMemory(b, 4, std=1.)
    PromptedLM(b, ours)(batch)["loss"].backward()
    assert (ours.vectors.grad != 0).all()


def test_errors_of_exchange(models, tmp_path):
    b = models["llama"]
    with pytest.raises(FileNotFoundError, match="adapter_config.json is missing"): from_peft(tmp_path, b)
    with pytest.raises(ValueError, match="brings layers, prepend"): to_peft(PromptedLM(b, DeepPrompts(b, 2)), tmp_path)
    to_peft(PromptedLM(b, SoftPrompt(b, 2)), tmp_path)
    with pytest.raises(ValueError, match="made for another model"): from_peft(tmp_path, random_backbone("llama", width=64))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "LORA"}))
    with pytest.raises(ValueError, match="of type LORA"): from_peft(tmp_path, b)


# the black box

def test_the_black_box_counts_and_does_not_depend_on_batches(models):
    prompts = [*SOURCES, "red", "what is the answer ?", "one two"]
    texts, scores = [], []
    for size in (1, 2, 16):
        box = LanguageModel(models["gpt2"], batch=size)
        texts.append(box.generate(prompts, max_new_tokens=4))
        assert box.calls == 5 and box.tokens_in == sum(len(t.ids) for t in tokenise(models["gpt2"], prompts)) and 0 < box.tokens_out <= 20
        scores.append(box.score(prompts, ["red", "blue star"]))
        assert box.calls == 10
        labels = box.classify(prompts, ["red", "blue star"])
        assert labels == [["red", "blue star"][k] for k in scores[-1].argmax(-1).tolist()]
        box.reset(); assert (box.calls, box.tokens_in, box.tokens_out) == (0, 0, 0)
    assert texts[0] == texts[1] == texts[2] and torch.allclose(scores[0], scores[2], atol=1e-4)
    assert [len(t) for t in box.generate(prompts[:2], n=3, temperature=1.)] == [3, 3]
    assert box.generate(prompts[:2], 3, 1., seed=4) == box.generate(prompts[:2], 3, 1., seed=4)
    assert box.generate([]) == [] and box.score([], ["a"]).shape == (0, 1)
    soft = LanguageModel(models["gpt2"], make(models["gpt2"], "soft"))
    assert soft.generate(prompts, max_new_tokens=4) != texts[0]
    assert torch.allclose(box.score(prompts, ["red", "blue star"], average=True)[:, 1], scores[2][:, 1] / 2, atol=1e-4)


def test_the_black_box_of_an_encoder_decoder(models):
    box = LanguageModel(models["t5"])
    assert len(box.generate(SOURCES, max_new_tokens=3)) == 2 and box.score(SOURCES, ["red", "a star"]).shape == (2, 2)


def test_the_scripted_model():
    fake = ScriptedModel(["a ; b", "c", "d"], scores=[[0, 1], [3, 2]])
    assert fake.generate(["p one", "q"], stop=[";"]) == [["a "], ["c"]] and fake.prompts == ["p one", "q"] and fake.tokens_in == 3
    assert fake.classify(["x", "y"], ["no", "yes"]) == ["yes", "no"] and fake.calls == 4
    assert fake.generate(["r"]) == [["d"]]
    for act, what in ((lambda: fake.generate(["s"]), "no answer left after 6 calls"), (lambda: fake.score(["s"], ["a"]), "no score left")):
        with pytest.raises(RuntimeError, match=what): act()
    echo = ScriptedModel(str.upper, lambda prompt, text: -abs(len(prompt) - len(text)))
    assert echo.generate(["ab"], n=2, temperature=1.) == [["AB", "AB"]] and echo.classify(["abc"], ["a", "abcd"]) == ["abcd"]
    for box in (fake, echo):
        for wrong in (lambda: box.generate("ab"), lambda: box.generate(["ab"], n=0), lambda: box.generate(["ab"], n=2), lambda: box.score(["ab"], [])):
            with pytest.raises(ValueError): wrong()


# the trie

def spelled(trie, tokens=(), limit=12):
    """Every complete sequence a trie allows, up to a length."""
    assert len(tokens) < limit, "a sequence that never ends"
    for token in trie.allowed(0, tokens):
        if token == trie.end: yield tokens
        else: yield from spelled(trie, (*tokens, token), limit)


def test_a_trie_allows_exactly_the_lists_of_different_labels():
    labels, end = [(1,), (1, 2), (3, 4)], 0
    wanted = {sum(((9, *labels[k]) for k in chosen), ())[1:] for n in (1, 2, 3) for chosen in permutations(range(3), n)}
    found = list(spelled(Trie(labels, [9], end)))
    assert set(found) == wanted and len(found) == len(set(found))
    assert set(spelled(Trie(labels, None, end))) == set(labels)
    assert all(sorted(set(t.read(f))) == sorted(t.read(f)) for t in [Trie(labels, [9], end)] for f in found)


def test_a_trie_with_labels_that_contain_the_separator_and_long_separators():
    assert set(spelled(Trie([(1,), (1, 9, 2), (2,)], [9], 0))) == {(1,), (1, 9, 2), (2,), (2, 9, 1), (1, 9, 2, 9, 2), (2, 9, 1, 9, 2), (1, 9, 2, 9, 1), (1, 9, 1, 9, 2), (1, 9, 1, 9, 2, 9, 2), (1, 9, 2, 9, 1, 9, 2),
                                                                  (1, 9, 2, 9, 2, 9, 1), (2, 9, 1, 9, 2, 9, 1), (2, 9, 1, 9, 1, 9, 2)}
    found = set(spelled(Trie([(1,), (2, 3)], [8, 9], 0)))
    assert found == {(1,), (2, 3), (1, 8, 9, 2, 3), (2, 3, 8, 9, 1)}


def test_after_all_labels_only_the_end_is_offered():
    trie = Trie([(1,), (2,)], [9], 0)
    assert trie.allowed(0, [1, 9, 2]) == [0] and trie.allowed(0, [1]) == [0, 9] and trie.allowed(0, [1, 0, 5]) == [0]
    assert trie.allowed(0, [1, 9, 2, 9]) == [0], "where a separator came by other means, the end is offered instead of nothing"
    assert trie.read([2, 9, 1, 0]) == [1, 0] and trie.read([2, 9]) == [1]
    for wrong in (lambda: Trie([], [9], 0), lambda: Trie([(1,), ()], [9], 0), lambda: Trie([(1,), (1,)], [9], 0), lambda: Trie([(1,)], [9])):
        with pytest.raises(ValueError): wrong()


@pytest.mark.parametrize("name", GENERATING)
def test_a_random_model_writes_only_labels(models, name):
    b, labels = models[name], ["red", "red star", "blue circle"]
    trie = Trie.of(b, labels, separator=";")
    out = make(b, "soft").generate(SOURCES * 4, 14, temperature=3., seed=0, constraint=trie.allowed)
    for row, text in zip(out.ids.tolist(), out.texts):
        chosen = trie.read(row)
        assert 0 < len(chosen) == len(set(chosen)) and text.split(" ; ") == [labels[k] for k in chosen]


def test_the_picture_of_the_input(models):
    for kind, side in (("soft", "left"), ("memory", "right"), ("none", "right")):
        method = make(models["llama"], kind, side=side)
        ax = show_input(method, method.encode(SOURCES, TARGETS))
        assert len(ax.images) == 1 and ax.images[0].get_array().shape[0] == 2


def test_unknown_architectures():
    with pytest.raises(ValueError, match="use one of llama"): random_backbone("lama")
    odd = SimpleNamespace(name="odd", kind="encoder", model=SimpleNamespace(base_model=nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="layers of 'odd' .* were not found"): model_blocks(odd)
