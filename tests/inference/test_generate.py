"""Generation: batches against single prompts, the cache against full passes, and against transformers."""

import pytest
import torch

from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.inference import complete, generate, stream
from minillm.lora import apply_lora, merge_lora
from minillm.model import KVCache, Transformer
from minillm.tokenizer import train_bpe

PROMPTS = [[5, 9, 2], [7], [11, 3, 8, 60, 1, 4, 90, 33, 20], [5, 9, 2, 6]]
SAMPLING = {"temperature": 1.1, "top_k": 40, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.1}


def tiny_config(**overrides):
    shape = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3}
    return ModelConfig(**(shape | overrides))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Transformer(tiny_config())


@pytest.fixture(scope="module")
def byte_tokenizer():
    return train_bpe(iter(["a"]), vocab_size=267)


class Scripted(torch.nn.Module):
    """Row b says ``scripts[b]``; its output layer ignores ``head``, as a wrapped one may."""

    def __init__(self, scripts: list[list[int]], vocab_size: int):
        super().__init__()
        self.config = tiny_config(vocab_size=vocab_size, max_position_embeddings=512)
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.scripts = scripts
        self.batch_sizes: list[int] = []

    def forward(self, input_ids, *, document_ids=None, cache=None, head=None):
        n_rows, n_tokens = input_ids.shape
        if not self.batch_sizes:
            self._follow(cache, n_rows)
        step = len(self.batch_sizes)
        self.batch_sizes.append(n_rows)
        logits = torch.full((n_rows, n_tokens, self.config.vocab_size), -30.0)
        for row, script in enumerate(self.running):
            logits[row, :, self.scripts[script][step]] = 30.0
        return logits

    def _follow(self, cache, n_rows):
        """Learn from the cache which rows are still running."""
        self.running, select = list(range(n_rows)), cache.select

        def spy(rows):
            self.running = [self.running[row] for row in rows.tolist()]
            return select(rows)

        cache.select = spy


def slow_greedy(model, prompt, n_tokens):
    """One full forward pass per token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n_tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_greedy_batch_equals_one_by_one_and_full_passes(model):
    together = generate(model, PROMPTS, max_new_tokens=20, temperature=0)
    alone = [generate(model, [prompt], max_new_tokens=20, temperature=0)[0] for prompt in PROMPTS]
    assert together == alone == [slow_greedy(model, prompt, 20) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in together}) > 1  # the test model does tell prompts apart


@pytest.mark.parametrize("penalty", [1.0, 1.4])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_greedy_equals_transformers(qk_norm, penalty):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    ours = Transformer(tiny_config(use_qk_norm=qk_norm, num_key_value_heads=1, tie_word_embeddings=False))
    family = "Qwen3" if qk_norm else "Llama"
    theirs_config = getattr(transformers, f"{family}Config")(**ours.config.to_hf())
    theirs = getattr(transformers, f"{family}ForCausalLM")(theirs_config).eval()
    theirs.load_state_dict(ours.state_dict())
    eos = slow_greedy(ours, PROMPTS[0], 8)[-1]  # a token that does come up
    answers = generate(ours, PROMPTS, max_new_tokens=20, temperature=0, repetition_penalty=penalty, eos_token_id=eos)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = theirs.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20,
            do_sample=False, repetition_penalty=penalty, eos_token_id=eos, pad_token_id=0,
        )  # fmt: skip
        assert answer == ids[0, len(prompt) :].tolist()


def test_top_k_one_is_greedy(model):
    greedy = generate(model, PROMPTS, max_new_tokens=10, temperature=0)
    assert generate(model, PROMPTS, max_new_tokens=10, temperature=2.0, top_k=1) == greedy


def seeded(seed=5):
    return torch.Generator().manual_seed(seed)


def test_sampling_is_reproducible_and_independent_of_companions(model):
    options = {"max_new_tokens": 16} | SAMPLING
    together = generate(model, PROMPTS, generator=seeded(), **options)
    assert together == generate(model, PROMPTS, generator=seeded(), **options)
    assert together != generate(model, PROMPTS, generator=seeded(6), **options)
    shared = seeded()  # one generator over several calls: the same as one call
    assert together == [generate(model, [prompt], generator=shared, **options)[0] for prompt in PROMPTS]
    others = [PROMPTS[0], [1, 2], PROMPTS[2], [80]]
    changed = generate(model, others, generator=seeded(), **options)
    assert (changed[0], changed[2]) == (together[0], together[2])
    assert len({tuple(ids) for ids in generate(model, [[7]] * 4, generator=seeded(), **options)}) == 4


def test_a_shorter_answer_is_the_beginning_of_a_longer_one(model):
    long = generate(model, PROMPTS, max_new_tokens=16, generator=seeded())
    short = generate(model, PROMPTS, max_new_tokens=5, generator=seeded())
    assert short == [ids[:5] for ids in long]


def test_sampled_first_tokens_follow_the_model(model):
    n = 4000
    tokens = torch.tensor(generate(model, [[5, 9, 2]] * n, max_new_tokens=1, generator=seeded()))[:, 0]
    with torch.no_grad():
        expected = model(torch.tensor([[5, 9, 2]]))[0, -1].softmax(-1)
    shares = torch.bincount(tokens, minlength=97) / n
    assert (shares - expected).abs().max() < 5 * (0.25 / n) ** 0.5  # five standard deviations


def test_rows_that_end_leave_the_batch():
    scripts = [[1, 2, 3, 4, 5, 6], [1, 9], [1, 2, 3, 9, 5], [9]]
    scripted = Scripted(scripts, 10)
    done = complete(scripted, [[1], [2, 3], [4], [5, 6, 7]], max_new_tokens=6, temperature=0, eos_token_id=9)
    assert [c.ids for c in done] == [[1, 2, 3, 4, 5, 6], [1, 9], [1, 2, 3, 9], [9]]
    assert [c.finish_reason for c in done] == ["length", "eos", "eos", "eos"]
    assert [c.text for c in done] == [None] * 4
    assert scripted.batch_sizes == [4, 3, 2, 2, 1, 1]


def test_dropping_rows_does_not_disturb_the_others(model):
    options = {"max_new_tokens": 20} | SAMPLING
    free = generate(model, PROMPTS, generator=seeded(), **options)
    eos = free[0][3]
    ended = generate(model, PROMPTS, generator=seeded(), eos_token_id=[eos, 96], **options)
    for before, after in zip(free, ended, strict=True):
        ends = [i for i, token in enumerate(before) if token in (eos, 96)]
        assert after == (before[: ends[0] + 1] if ends else before)
    assert len(ended[0]) <= 4


def test_the_configuration_gives_the_end_token(model):
    eos = slow_greedy(model, PROMPTS[0], 4)[-1]
    torch.manual_seed(0)
    other = Transformer(tiny_config(eos_token_id=eos))
    assert generate(other, PROMPTS[:1], max_new_tokens=20, temperature=0)[0][-1] == eos
    assert len(generate(other, PROMPTS[:1], max_new_tokens=20, temperature=0, eos_token_id=())[0]) == 20


def test_stop_strings_end_a_row_and_are_cut_from_its_text(byte_tokenizer):
    scripts = [byte_tokenizer.encode(text) for text in ("one END two", "no stop here", "E EN 完 END")]
    scripted = Scripted(scripts, 267)
    done = complete(
        scripted,
        [[1], [2], [3]],
        max_new_tokens=12,
        temperature=0,
        stop=["END", "完"],
        tokenizer=byte_tokenizer,
    )
    assert [c.text for c in done] == ["one ", "no stop here", "E EN "]
    assert [c.finish_reason for c in done] == ["stop", "length", "stop"]
    assert byte_tokenizer.decode(done[0].ids) == "one END"  # the ids go up to the end of the stop string


def test_stream_never_shows_half_a_character(byte_tokenizer):
    text = "👩‍👩‍👧 你好 🙂"
    scripted = Scripted([[*byte_tokenizer.encode(text), byte_tokenizer.im_end_id]], 267)
    options = {"tokenizer": byte_tokenizer, "eos_token_id": byte_tokenizer.im_end_id, "temperature": 0}
    pieces = list(stream(scripted, [1], max_new_tokens=100, **options))
    assert pieces == list(text)
    # Cut off in the middle of the last character: it is not printed.
    cut = Scripted([byte_tokenizer.encode(text)], 267)
    n_bytes = len(text.encode()) - 2
    assert "".join(stream(cut, [1], max_new_tokens=n_bytes, **options)) == text[:-1]


def test_stream_never_shows_a_part_of_a_stop_string(byte_tokenizer):
    text = "a\nUs b\nUser: c"
    scripted = Scripted([byte_tokenizer.encode(text)], 267)
    pieces = list(stream(scripted, [1], tokenizer=byte_tokenizer, max_new_tokens=50, temperature=0, stop="\nUser:"))
    assert pieces == ["a", "\nUs ", "b"]


def test_stream_equals_complete(model, byte_tokenizer):
    torch.manual_seed(2)
    talker = Transformer(tiny_config(vocab_size=267))
    options = {"max_new_tokens": 30, "stop": ["q"], "tokenizer": byte_tokenizer} | SAMPLING
    for seed in range(5):
        done = complete(talker, [[1, 2]], generator=seeded(seed), **options)[0]
        pieces = stream(talker, [1, 2], generator=seeded(seed), **options)
        shown, returned = [], None
        while returned is None:
            try:
                shown.append(next(pieces))
            except StopIteration as end:
                returned = end.value
        assert returned == done
        assert "".join(shown) == done.text
        assert all(shown)


def test_answers_end_where_the_positions_end(model):
    prompt = list(range(1, 61))  # 60 of 64 positions
    done = complete(model, [prompt, [3]], max_new_tokens=10, temperature=0)
    assert [len(c.ids) for c in done] == [4, 10]
    assert done[0].ids == slow_greedy(model, prompt, 4)
    with pytest.raises(UserError, match=r"64 tokens.*64 positions"):
        generate(model, [[3], [1] * 64], max_new_tokens=1)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 97]], {}, "token id 97"),
        ([[-1]], {}, "token id -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"stop": "x"}, "tokenizer="),
    ],
)
def test_bad_input_is_named(model, prompts, options, message):
    with pytest.raises(UserError, match=message):
        generate(model, prompts, **({"max_new_tokens": 4} | options))


def test_stream_checks_at_the_call(model, byte_tokenizer):
    with pytest.raises(UserError, match="prompt 0 is empty"):
        stream(model, [], tokenizer=byte_tokenizer, max_new_tokens=4)


def test_no_prompts_no_answers(model):
    assert generate(model, [], max_new_tokens=4) == []


def test_training_mode_comes_back_even_after_a_closed_stream(byte_tokenizer):
    talker = Transformer(tiny_config(vocab_size=267)).train()
    generate(talker, [[1]], max_new_tokens=2)
    assert talker.training
    pieces = stream(talker, [1], tokenizer=byte_tokenizer, max_new_tokens=50, generator=seeded())
    next(pieces)
    pieces.close()
    assert talker.training


def test_half_precision_weights(model):
    half = Transformer(tiny_config()).bfloat16()
    assert [len(ids) for ids in generate(half, PROMPTS, max_new_tokens=5, generator=seeded())] == [5] * 4


@pytest.mark.cuda
def test_on_a_gpu_greedy_equals_the_cpu():
    torch.manual_seed(0)
    wide = Transformer(tiny_config()).double()
    expected = generate(wide, PROMPTS, max_new_tokens=12, temperature=0)
    sampled = generate(wide, PROMPTS, max_new_tokens=12, generator=seeded(), **SAMPLING)
    wide = wide.cuda()
    assert generate(wide, PROMPTS, max_new_tokens=12, temperature=0) == expected
    assert generate(wide, PROMPTS, max_new_tokens=12, generator=seeded(), **SAMPLING) == sampled


def test_an_adapted_output_layer_answers_as_the_merged_one():
    torch.manual_seed(0)
    model = Transformer(tiny_config())
    plain = generate(model, PROMPTS, max_new_tokens=8, temperature=0)
    apply_lora(model, rank=2, target_modules="lm_head")
    torch.nn.init.normal_(model.lm_head.lora.B.weight)
    adapted = generate(model, PROMPTS, max_new_tokens=8, temperature=0)
    assert adapted != plain
    assert adapted == generate(merge_lora(model, keep_base=False), PROMPTS, max_new_tokens=8, temperature=0)


class Broken(Scripted):
    """Row 1 becomes NaN, infinite or impossible in one place, at a given step."""

    def __init__(self, value: float, place: int | slice, at: int):
        super().__init__([[5, 6, 7, 8]] * 2, 97)
        self.value, self.place, self.at = value, place, at

    def forward(self, *args, **named):
        logits = super().forward(*args, **named)
        if len(self.batch_sizes) - 1 == self.at:
            logits[1, :, self.place] = self.value
        return logits


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize(("value", "place"), [("nan", slice(None)), ("nan", 3), ("inf", 3), ("-inf", slice(None))])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 1.0}, {"top_k": 4, "top_p": 0.9}], ids=str)
def test_logits_that_are_not_finite_are_an_error(value, place, at, options):
    """The largest of NaN is token 0 for ever; which prompt and which token is said."""
    broken = Broken(float(value), place, at)
    with pytest.raises(UserError, match=f"prompt 1: the model's logits are not finite .* at new token {at + 1}:"):
        generate(broken, [[1, 2], [3, 4]], max_new_tokens=4, eos_token_id=(), **options)


def test_the_cache_has_the_dtype_of_its_keys(model, monkeypatch):
    """Under autocast that is not the weights': converting would copy the whole cache in every step."""
    caches, store = set(), KVCache.store

    def watch(cache, layer, keys, values):
        seen = store(cache, layer, keys, values)
        caches.add((keys.dtype, values.dtype, cache.keys[layer].dtype, cache.values[layer].dtype))
        assert all(t.data_ptr() == b[layer].data_ptr() for t, b in zip(seen, (cache.keys, cache.values), strict=True))
        return seen

    monkeypatch.setattr(KVCache, "store", watch)
    for dtype in (torch.float32, torch.bfloat16):
        caches.clear()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            generate(model, PROMPTS, max_new_tokens=5, temperature=0)
        assert caches == {(dtype,) * 4}
