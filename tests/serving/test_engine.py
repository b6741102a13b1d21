"""The engine against ``generate``: whoever else runs, a request's answer is its own."""

import random
from functools import partial

import pytest
import torch

from minillm.config import ModelConfig
from minillm.errors import UserError
from minillm.inference import SamplingOptions, complete, generate, stream
from minillm.inference.sampling import process_logits
from minillm.lora import apply_lora, save_lora
from minillm.model import Transformer
from minillm.serving import DraftModel, Engine, PromptLookup, QueueFullError
from minillm.serving.decode import RecordedDecode
from minillm.tokenizer import train_bpe

GREEDY = SamplingOptions(temperature=0)


def tiny(seed: int = 0, **overrides) -> Transformer:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3}
    return Transformer(ModelConfig(**(sizes | overrides)))


@pytest.fixture(scope="module")
def model():
    return tiny()


def alone(model, prompt, n: int, options: SamplingOptions = GREEDY, seed: int = 0) -> list[int]:
    """Return the answer of ``generate`` to one prompt."""
    own = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    generator = torch.Generator().manual_seed(seed)
    return generate(model, [prompt], max_new_tokens=n, generator=generator, **own)[0]


def traffic(engine, model, *, n: int, seed: int, sampled: bool = True) -> None:
    """Send ``n`` random requests at random times, cancel some, and compare each with its single run."""
    rng = random.Random(seed)
    prefixes = [[rng.randrange(97) for _ in range(rng.randrange(20))] for _ in range(3)]
    requests = []
    for number in range(n):
        prompt = rng.choice([[], *prefixes]) + [rng.randrange(97) for _ in range(rng.randrange(1, 15))]
        temperature = rng.choice([0.0, 0.9]) if sampled else 0.0
        filters = {"top_k": rng.choice([0, 20]), "repetition_penalty": rng.choice([1.0, 1.3])}
        options = SamplingOptions(temperature=temperature, **filters)
        request = engine.submit(prompt, max_new_tokens=rng.randrange(1, 20), sampling=options, seed=number)
        requests.append((request, number))
        if rng.random() < 0.2:
            rng.choice(requests)[0].cancel()
        for _ in range(rng.randrange(3)):
            engine.step()
    engine.run()
    assert engine.stats.n_free_pages == engine.stats.n_pages
    assert not engine.has_work
    n_cancelled = 0
    for request, number in requests:
        answer = alone(model, list(request.prompt_ids), request.answer.limit, request.answer.options, number)
        if request.finish_reason == "cancelled":
            n_cancelled += 1
            answer = answer[: len(request.new_ids)]
        assert request.new_ids == answer
    assert 0 < n_cancelled < n


@pytest.mark.parametrize("shape", [{}, {"sliding_window": 7}, {"num_experts": 4, "num_key_value_heads": 4}])
def test_answers_equal_single_runs(shape):
    model = tiny(**shape)
    engine = Engine(model, n_pages=20, page_len=4, max_batch=6, max_batch_tokens=16)
    traffic(engine, model, n=60, seed=1)
    assert engine.stats.n_preempted
    assert engine.stats.n_cached_tokens


def test_two_thousand_requests():
    model = tiny(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    engine = Engine(model, n_pages=60, page_len=4, max_batch=32, max_batch_tokens=128)
    rng, wanted, requests = random.Random(0), {}, []
    prompts = [tuple(rng.randrange(97) for _ in range(rng.randrange(1, 12))) for _ in range(50)]
    for _ in range(2_000):
        prompt, n = rng.choice(prompts), rng.randrange(1, 6)
        if (prompt, n) not in wanted:
            wanted[prompt, n] = alone(model, list(prompt), n)
        requests.append((engine.submit(prompt, max_new_tokens=n), wanted[prompt, n]))
        if rng.random() < 0.1:
            engine.step()
    engine.run()
    assert all(request.new_ids == ids for request, ids in requests)
    assert engine.stats.n_free_pages == 60


@pytest.mark.parametrize("drafter", [PromptLookup(n_match=1), DraftModel(tiny(3, hidden_size=16), n_draft=3)])
def test_speculation_keeps_greedy_ids(model, drafter):
    engine = Engine(model, n_pages=20, page_len=4, max_batch=6, max_batch_tokens=16, drafter=drafter)
    traffic(engine, model, n=60, seed=2, sampled=False)
    assert 0 < engine.stats.n_accepted < engine.stats.n_drafted


class Every:
    """A constraint that looks back: which tokens may come depends on those that came."""

    def __init__(self, n: int):
        self.n, self.total = n, 0

    def allowed(self, vocab_size):
        return (torch.arange(vocab_size) + self.total) % self.n == 0

    def accept(self, token):
        self.total += token + 1


@torch.no_grad()
def obvious(model, prompt, n: int, options, eos_ids, constraint) -> list[int]:
    """Return a greedy answer by the slow definition: everything is read again for each token."""
    ids = []
    while len(ids) < n and not (ids and ids[-1] in eos_ids):
        logits = model(torch.tensor([[*prompt, *ids]]))[0, -1]
        if constraint is not None:
            logits = logits.masked_fill(~constraint.allowed(len(logits)), float("-inf"))
        seen = torch.zeros(1, len(logits), dtype=torch.bool)
        seen[0, [*prompt, *ids]] = True
        ids.append(int(process_logits(logits[None], options, seen).argmax()))
        if constraint is not None:
            constraint.accept(ids[-1])
    return ids


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("seed", range(6))
def test_engines_with_random_settings(seed, tmp_path):
    rng = random.Random(seed)
    shape = rng.choice([{}, {"sliding_window": 5}, {"num_experts": 4}, {"rope_scaling": YARN}])
    model, adapted = tiny(seed, **shape), tiny(seed, **shape)
    apply_lora(adapted, rank=2)
    for name, parameter in adapted.named_parameters():
        if ".lora." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_lora(adapted, tmp_path / "a")
    small = tiny(seed + 1, hidden_size=16, max_position_embeddings=24)
    drafter = [None, PromptLookup(n_match=1), DraftModel(small, n_draft=3), DraftModel(model, n_draft=5)][seed % 4]
    page_len = rng.choice([1, 3, 16])
    n_pages, settings = (
        -(-48 // page_len),
        {"max_batch": rng.choice([2, 8]), "max_batch_tokens": rng.choice([1, 5, 24])},
    )
    engine = Engine(model, n_pages=n_pages, page_len=page_len, drafter=drafter, **settings)
    engine.add_adapter("a", tmp_path / "a")
    prefix, requests = [rng.randrange(97) for _ in range(9)], []
    for _ in range(10):
        prompt = rng.choice([[], prefix]) + [rng.randrange(97) for _ in range(rng.randrange(1, 9))]
        options = SamplingOptions(temperature=0, repetition_penalty=rng.choice([1.0, 1.5]))
        asked = {"eos_ids": rng.choice([(), (3, 5, 13, 77)]), "n": rng.randrange(1, 25)}
        n, adapter = rng.choice([None, 5]), rng.choice([None, "a"])
        own = {"eos_token_id": asked["eos_ids"], "max_new_tokens": asked["n"], "constraint": n and Every(n)}
        request = engine.submit(prompt, sampling=options, adapter=adapter, n_logprobs=0, **own)
        requests.append((request, asked | {"options": options, "constraint": n and Every(n)}))
        for piece in engine.step():
            assert len(piece.log_probs) == len(piece.ids)
    engine.run()
    assert engine.stats.n_free_pages == n_pages
    for request, asked in requests:
        used = model if request.adapter is None else adapted
        assert request.new_ids == obvious(used, list(request.prompt_ids), **asked)


def test_a_draft_model_that_is_the_model_is_always_right(model):
    engine = Engine(model, drafter=DraftModel(model, n_draft=3))
    request = engine.submit([5, 9, 2], max_new_tokens=13)
    engine.run()
    assert request.new_ids == alone(model, [5, 9, 2], 13)
    assert engine.stats.n_steps == 4  # 4 + 4 + 4 + 1
    assert engine.stats.n_accepted == engine.stats.n_drafted == 9


def test_the_first_prompt_is_read_while_others_answer(model):
    engine = Engine(model, page_len=4, max_batch_tokens=8)
    short = engine.submit([7], max_new_tokens=12)
    engine.step()
    long = engine.submit([n % 97 for n in range(40)], max_new_tokens=3)
    counts = []
    while not long.new_ids:
        engine.step()
        counts.append(len(short.new_ids))
    assert counts == [2, 3, 4, 5, 6, 7]  # 7 tokens of the prompt in each step, one of the answer
    engine.run()
    assert long.new_ids == alone(model, list(long.prompt_ids), 3)
    assert short.new_ids == alone(model, [7], 12)


def test_a_prompt_that_is_there_computes_its_last_token(model):
    prompt = [n % 97 for n in range(32)]
    engine = Engine(model, page_len=4)
    first = engine.submit(prompt, max_new_tokens=9)
    engine.run()
    second, longer = engine.submit(prompt, max_new_tokens=9), engine.submit([*prompt, *first.new_ids], max_new_tokens=2)
    engine.run()
    assert second.new_ids == first.new_ids
    assert second.n_cached == 28
    assert longer.n_cached == 40  # the answer's pages are found too
    assert longer.new_ids == alone(model, [*prompt, *first.new_ids], 2)


def test_adapters_in_one_batch(tmp_path, model):
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = {}
    for number, targets in enumerate(("all-linear", "q_proj,down_proj")):
        adapted[f"a{number}"] = tiny()
        apply_lora(adapted[f"a{number}"], rank=3 + number, alpha=9, target_modules=targets)
        for name, parameter in adapted[f"a{number}"].named_parameters():
            if ".lora." in name:
                torch.nn.init.normal_(parameter, std=0.3)
        save_lora(adapted[f"a{number}"], tmp_path / f"a{number}")
    engine = Engine(model, page_len=4, max_batch_tokens=24)
    for name in adapted:
        engine.add_adapter(name, tmp_path / name)
    rng, requests = random.Random(0), []
    shared = [rng.randrange(97) for _ in range(9)]
    for name in [None, "a0", "a1"] * 6:
        prompt = shared + [rng.randrange(97) for _ in range(rng.randrange(1, 9))]
        requests.append((name, engine.submit(prompt, max_new_tokens=12, adapter=name)))
        engine.step()
    with pytest.raises(UserError, match="'a1' is in use"):
        engine.remove_adapter("a1")
    engine.run()
    for name, request in requests:
        assert request.new_ids == alone(adapted.get(name, model), list(request.prompt_ids), 12)
    assert engine.stats.n_cached_tokens
    for name in adapted:
        engine.remove_adapter(name)
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    with pytest.raises(UserError, match="no adapter 'a0': there are none"):
        engine.submit([1], adapter="a0")


def test_an_adapter_of_the_same_name_shares_no_pages(tmp_path, model):
    answers = []
    engine = Engine(model, page_len=2)
    for number in range(2):
        other = tiny()
        apply_lora(other, rank=2)
        torch.manual_seed(number)
        for name, parameter in other.named_parameters():
            if ".lora." in name:
                torch.nn.init.normal_(parameter, std=0.5)
        save_lora(other, tmp_path / f"{number}.pth")
        engine.add_adapter("a", tmp_path / f"{number}.pth")
        request = engine.submit([1, 2, 3, 4, 5], max_new_tokens=8, adapter="a")
        engine.run()
        assert request.new_ids == alone(other, [1, 2, 3, 4, 5], 8)
        answers.append(request.new_ids)
        engine.remove_adapter("a")
    assert answers[0] != answers[1]


def test_adapters_that_cannot_run_beside_others(tmp_path, model):
    engine = Engine(model)
    for number, settings in enumerate(({"use_dora": True}, {"target_modules": "q_proj,embed_tokens"})):
        other = tiny()
        apply_lora(other, rank=2, **settings)
        save_lora(other, tmp_path / str(number))
        with pytest.raises(UserError, match="merge it"):
            engine.add_adapter("a", tmp_path / str(number))
    small = tiny(hidden_size=16)
    apply_lora(small, rank=2)
    save_lora(small, tmp_path / "small")
    with pytest.raises(UserError, match="does not fit this model"):
        engine.add_adapter("a", tmp_path / "small")
    assert engine.adapter_names == []


def test_text_log_probs_and_stop_strings():
    tokenizer = train_bpe(iter(["a"]), vocab_size=267)
    model = tiny(vocab_size=267)
    engine = Engine(model, tokenizer)
    prompt = tokenizer.encode("héllo")
    whole = complete(model, [prompt], max_new_tokens=30, temperature=0, tokenizer=tokenizer, eos_token_id=())[0]
    stop = whole.text[3:5]
    request = engine.submit(prompt, max_new_tokens=30, stop=stop, n_logprobs=3, eos_token_id=())
    pieces = []
    while engine.has_work:
        pieces += engine.step()
    settings = {"max_new_tokens": 30, "temperature": 0, "stop": stop, "eos_token_id": ()}
    text = "".join(stream(model, prompt, tokenizer=tokenizer, **settings))
    assert "".join(piece.text for piece in pieces) == request.completion().text == text
    assert request.finish_reason == "stop"
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *request.new_ids]]))[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1)
    entries = [entry for piece in pieces for entry in piece.log_probs]
    assert len(entries) == len(request.new_ids)
    for entry, row, token in zip(entries, expected, request.new_ids, strict=True):
        assert entry.log_prob == pytest.approx(float(row[token]), abs=1e-4)
        assert [i for i, _ in entry.top] == row.topk(3).indices.tolist()


def test_one_damaged_request_does_not_disturb_the_others(model):
    class Damaged(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.inner = model.config, model

        def forward(self, tokens, **settings):
            logits = self.inner(tokens, **settings)
            bad = (tokens == 13).any(dim=0).nonzero()
            for layer in settings["cache"]._layers:
                layer[0].view(-1, *layer[0].shape[2:])[settings["cache"]._slots[bad]] = float("nan")
            return logits + (torch.nan if len(bad) and tokens.shape[1] > 1 else 0) if self.breaks else logits

    broken = Damaged()
    broken.breaks = True
    engine = Engine(broken, n_pages=4, page_len=4)
    bad = engine.submit([13, 13, 2], max_new_tokens=5)
    engine.run()
    assert bad.finish_reason == "error"
    assert "not finite" in bad.error
    assert bad.new_ids == []
    broken.breaks = False
    good = engine.submit([5, 9, 2], max_new_tokens=12)  # in the pages that the other one had
    engine.run()
    assert good.new_ids == alone(model, [5, 9, 2], 12)


def test_drafts_longer_than_a_step(model):
    for budget in (1, 2, 3):
        engine = Engine(model, max_batch_tokens=budget, drafter=DraftModel(model, n_draft=5))
        requests = [engine.submit([n, 9, 2], max_new_tokens=8) for n in range(2)]
        for _ in range(60):
            engine.step()
        assert not engine.has_work
        for request in requests:
            assert request.new_ids == alone(model, list(request.prompt_ids), 8)


def test_cached_tokens_are_those_of_others(model):
    engine = Engine(model, n_pages=12, page_len=2, max_batch_tokens=8)
    first = engine.submit([7, 8], max_new_tokens=20)
    for _ in range(10):
        engine.step()
    second = engine.submit([n + 20 for n in range(20)], max_new_tokens=2)  # read in part, then it loses its pages
    engine.run()
    assert engine.stats.n_preempted
    assert first.n_cached == second.n_cached == 0
    assert second.new_ids == alone(model, list(second.prompt_ids), 2)


def test_the_end_inside_a_draft(model):
    ids = alone(model, [5, 9, 2], 13)
    engine = Engine(model, drafter=DraftModel(model, n_draft=3))
    request = engine.submit([5, 9, 2], max_new_tokens=13, eos_token_id=ids[5])
    engine.run()
    assert request.new_ids == ids[:6]
    assert request.finish_reason == "eos"
    assert engine.stats.n_accepted == 5  # 3 and one of the model's, then 2


def test_a_damaged_request_leaves_shared_pages_alone():
    damaged, model = tiny(tie_word_embeddings=False), tiny(tie_word_embeddings=False)
    with torch.no_grad():
        damaged.model.embed_tokens.weight[13] = float("nan")
    prefix = [5, 9, 2, 6, 1, 1, 8, 4]
    engine = Engine(damaged, page_len=4)
    good = engine.submit([*prefix, 3], max_new_tokens=12)
    engine.step()
    bad = engine.submit([*prefix, 13], max_new_tokens=12)
    engine.run()
    later = engine.submit([*prefix, 3], max_new_tokens=12)
    engine.run()
    assert bad.n_cached == later.n_cached == 8
    assert bad.finish_reason == "error"
    assert good.new_ids == later.new_ids == alone(model, [*prefix, 3], 12)


def test_pages_of_a_damaged_prompt_are_not_found():
    damaged, model = tiny(tie_word_embeddings=False), tiny(tie_word_embeddings=False)
    engine = Engine(damaged, n_pages=4, page_len=4)
    weight = damaged.model.embed_tokens.weight
    with torch.no_grad():
        row = weight[13].clone()
        weight[13] = float("nan")
        bad = engine.submit([13, 9, 2, 6, 1, 1], max_new_tokens=5)
        engine.run()
        weight[13] = row
    again = engine.submit([13, 9, 2, 6, 1, 1], max_new_tokens=5)
    engine.run()
    assert bad.finish_reason == "error"
    assert again.n_cached == 0
    assert again.new_ids == alone(model, [13, 9, 2, 6, 1, 1], 5)


@pytest.mark.parametrize("drafter", [None, DraftModel(tiny(3, hidden_size=16), n_draft=3)])
def test_a_step_that_fails_can_be_repeated(drafter):
    class Failing(Transformer):
        n_left = 0

        def forward(self, *args, **settings):
            out = super().forward(*args, **settings)  # keys are written, their logits are lost
            self.n_left -= 1
            if self.n_left == 0:
                raise RuntimeError("out of memory")
            return out

    model = tiny()
    failing = Failing(model.config)
    failing.load_state_dict(model.state_dict())
    engine = Engine(failing, n_pages=12, page_len=2, max_batch_tokens=8, drafter=drafter)
    requests = [engine.submit([n, 9, 2, 4, 4], max_new_tokens=9) for n in range(4)]
    n_failed = 0
    while engine.has_work:
        failing.n_left = 1 + n_failed % 3
        try:
            for _ in range(3):
                engine.step()
        except RuntimeError:
            n_failed += 1
    assert n_failed > 3
    assert engine.stats.n_free_pages == 12
    for request in requests:
        assert request.new_ids == alone(model, list(request.prompt_ids), 9)


def test_two_engines_on_one_model(tmp_path, model):
    adapted, engines = [], []
    for number in range(2):
        adapted.append(tiny())
        apply_lora(adapted[number], rank=2)
        torch.manual_seed(number)
        for name, parameter in adapted[number].named_parameters():
            if ".lora." in name:
                torch.nn.init.normal_(parameter, std=0.5)
        save_lora(adapted[number], tmp_path / str(number))
        engines.append(Engine(model))
        engines[number].add_adapter("a", tmp_path / str(number))
    requests = [engine.submit([5, 9, 2], max_new_tokens=8, adapter="a") for engine in engines]
    while any(engine.has_work for engine in engines):
        for engine in engines:
            engine.step()
    for request, other in zip(requests, adapted, strict=True):
        assert request.new_ids == alone(other, [5, 9, 2], 8)
    engines[0].remove_adapter("a")
    request = engines[1].submit([5, 9, 2], max_new_tokens=8, adapter="a")
    engines[1].run()
    assert request.new_ids == requests[1].new_ids


def test_two_engines_share_a_drafter(model):
    drafter = DraftModel(tiny(3, hidden_size=16), n_draft=3)
    engines = [Engine(model, drafter=drafter) for _ in range(2)]
    requests = [e.submit([5, 9, 2], max_new_tokens=n) for e, n in zip(engines, (5, 30), strict=True)]
    while any(engine.has_work for engine in engines):
        for engine in engines:
            engine.step()
    assert [request.new_ids for request in requests] == [alone(model, [5, 9, 2], n) for n in (5, 30)]


def test_the_callers_prompt_may_change(model):
    prompt = [5, 9, 2]
    engine = Engine(model)
    request = engine.submit(prompt, max_new_tokens=4)
    prompt.append(96)
    engine.run()
    assert request.new_ids == alone(model, [5, 9, 2], 4)


def test_dynamic_angles_run_one_at_a_time():
    scaling = {"rope_type": "dynamic", "factor": 16.0, "original_max_position_embeddings": 8}
    model = tiny(rope_scaling=scaling)
    with pytest.raises(UserError, match="dynamic"):
        Engine(model, drafter=PromptLookup())
    engine = Engine(model, page_len=4)
    requests = [engine.submit([n, 5, 6, 7, 8, 9], max_new_tokens=20) for n in range(3)]
    engine.run()
    for request in requests:
        assert request.new_ids == alone(model, list(request.prompt_ids), 20)


def test_what_is_refused(model):
    engine = Engine(model, n_pages=5, page_len=4, max_queue=2)
    for settings, message in (
        ({"prompt_ids": []}, "empty"),
        ({"prompt_ids": [97]}, "token id 97"),
        ({"prompt_ids": [1] * 200}, "200 tokens"),
        ({"prompt_ids": [1] * 10, "max_new_tokens": 12}, "need 6 pages, the engine has 5"),
        ({"prompt_ids": [1], "max_new_tokens": 0}, "max_new_tokens 0"),
        ({"prompt_ids": [1], "n_logprobs": 21}, "n_logprobs 21"),
        ({"prompt_ids": [1], "stop": "x"}, "tokenizer"),
        ({"prompt_ids": [1], "seed": 2**64}, "seed 18446744073709551616"),
        ({"prompt_ids": [1], "adapter": "no"}, "no adapter 'no'"),
    ):
        with pytest.raises(UserError, match=message):
            engine.submit(**({"max_new_tokens": 4} | settings))
    assert not engine.has_work
    engine.submit([1] * 10, max_new_tokens=11)  # it just fits
    engine.submit([2], max_new_tokens=4)
    with pytest.raises(QueueFullError, match="max_queue"):
        engine.submit([3], max_new_tokens=4)
    engine.run()
    with pytest.raises(UserError, match="same tokenizer"):
        Engine(model, drafter=DraftModel(tiny(vocab_size=50)))


def test_the_model_stays_in_training_mode_between_steps(model):
    model.train()
    engine = Engine(model)
    engine.submit([1], max_new_tokens=2)
    engine.step()
    assert model.training
    model.eval()


def test_steps_that_are_filled_up_give_the_same_ids(model):
    class Filled:
        """What a GPU's recorded steps ask for, run as it is."""

        shape = RecordedDecode.shape

        def __call__(self, cache, tokens):
            planned = tuple(tensor.clone() for tensor in cache.planned)
            cache.planned = planned
            shapes.add((tokens.shape[1], cache.page_groups[0].pages.shape[1]))
            return engine._decode_logits(cache, tokens)

    shapes = set()
    engine = Engine(model, n_pages=20, page_len=4, max_batch=6, max_batch_tokens=16)
    engine._decode = Filled()
    traffic(engine, model, n=60, seed=4)
    assert len(shapes) > 4
    assert all(number & (number - 1) == 0 for shape in shapes for number in shape)


def test_compiled_decoding(monkeypatch):
    # What the compiler reads of the model is tested here; the code that it writes takes a minute to build.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model = tiny(num_hidden_layers=1)
    engine = Engine(model, page_len=4, compile=True)
    requests = [engine.submit(prompt, max_new_tokens=12) for prompt in ([5, 9, 2], [7], [11, 3, 8, 60, 1])]
    engine.run()
    for request in requests:
        assert request.new_ids == alone(model, list(request.prompt_ids), 12)
