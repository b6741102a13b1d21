"""trl as a second witness: its trainers' losses on the same token ids, from the same model.

trl's DPO has no label smoothing for the sigmoid loss any more; its ``aot`` smooths, and sorts the margins of a batch,
which leaves a batch of one pair as it is: that is cDPO. Terms that trl averages over the tokens of a batch, not per
pair (its ``sft``, CPO's and ORPO's likelihood), are ours too in a batch of one pair.
"""

import os

import pytest
import torch

from minillm.losses import dpo_loss, kto_baseline, kto_loss, linear_log_probs, sequence_log_probs

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here asks the hub, and nothing should
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
cpo = pytest.importorskip("trl.experimental.cpo")
orpo = pytest.importorskip("trl.experimental.orpo")
tokenizers = pytest.importorskip("tokenizers")

BOUND = 1e-5  # float32, sums over a model's layers in another order
N_PAIRS = 4


def llama(seed: int):
    """A tiny model with random weights, large enough that its distributions are far from uniform."""
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def models():
    """(policy, reference)."""
    return llama(0), llama(1)


@pytest.fixture(scope="module")
def tokenizer():
    """What a trainer wants to see at its making; all ids that are compared are given as ids."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w1", eos_token="w2")


def pairs(prompt_len: int | None = None) -> list[dict[str, list[int]]]:
    """Ragged pairs of replies, as token ids; prompts of one length, or of 2 to 7 tokens."""
    generator = torch.Generator().manual_seed(4)

    def ids(n: int | None, low: int) -> list[int]:
        n = n or int(torch.randint(low, low + 6, (1,), generator=generator))
        return torch.randint(3, 40, (n,), generator=generator).tolist()

    names = (("prompt_ids", prompt_len, 2), ("chosen_ids", None, 1), ("rejected_ids", None, 4))
    return [{name: ids(n, low) for name, n, low in names} for _ in range(N_PAIRS)]


def trainer_of(kind, config, models, tokenizer, tmp_path, **settings):
    """One of trl's trainers. It works on copies: some change the forward of the models that they get."""
    policy, reference = (transformers.LlamaForCausalLM(model.config) for model in models)
    for copy, model in zip((policy, reference), models, strict=True):
        copy.load_state_dict(model.state_dict())
    text = {"prompt": ["w5 w6"] * 2, "chosen": ["w7"] * 2, "rejected": ["w8"] * 2}
    if kind is trl.KTOTrainer:
        text = {"prompt": ["w5 w6"] * 2, "completion": ["w7", "w8"], "label": [True, False]}
    args = config(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False,
        per_device_train_batch_size=2, max_length=64, **settings,
    )  # fmt: skip
    others = {} if kind in (cpo.CPOTrainer, orpo.ORPOTrainer) else {"ref_model": reference}
    dataset = datasets.Dataset.from_dict(text)
    return kind(model=policy, args=args, train_dataset=dataset, processing_class=tokenizer, **others)


def trl_sum(trainer, examples: list[dict], batch_size: int):
    """The trainer's loss, a mean over each batch, as a sum over all examples; and its gradients."""
    total = 0.0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        total = total + len(batch) * trainer.compute_loss(trainer.model, trainer.data_collator(batch))
    return total, torch.autograd.grad(total, list(trainer.model.parameters()))


def log_probs(model, prompts: list[list[int]], replies: list[list[int]]):
    """Our (sums, lengths), (P,) each: one padded batch of prompts with their replies."""
    n = max(len(prompt) + len(reply) for prompt, reply in zip(prompts, replies, strict=True))
    ids = torch.ones(len(prompts), n, dtype=torch.long)
    targets = torch.full((len(prompts), n), -100)
    for row, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        start, end = len(prompt), len(prompt) + len(reply)
        ids[row, :end] = torch.tensor(prompt + reply)
        targets[row, start - 1 : end - 1] = torch.tensor(reply)
    sums, lengths = sequence_log_probs(linear_log_probs(model(ids).logits, None, targets), targets)
    return sums.squeeze(1), lengths.squeeze(1)


def columns(examples: list[dict], *names: str) -> list[list]:
    return [[example[name] for example in examples] for name in names]


def our_sum(models, examples: list[dict], **settings):
    """``dpo_loss`` of the examples, and its gradients."""
    prompts, chosen, rejected = columns(examples, "prompt_ids", "chosen_ids", "rejected_ids")
    (good, n_good), (bad, n_bad) = (log_probs(models[0], prompts, replies) for replies in (chosen, rejected))
    references = []
    if settings["loss_type"] not in ("simpo", "orpo"):
        with torch.no_grad():
            references = [log_probs(models[1], prompts, replies)[0] for replies in (chosen, rejected)]
    total, n_pairs = dpo_loss(good, bad, *references, chosen_lengths=n_good, rejected_lengths=n_bad, **settings)
    assert n_pairs.item() == N_PAIRS
    return total, torch.autograd.grad(total, list(models[0].parameters()))


def assert_equal(ours, theirs) -> None:
    assert abs(ours[0].item() - theirs[0].item()) <= BOUND * abs(theirs[0].item())
    for gradient, reference in zip(ours[1], theirs[1], strict=True):
        assert ((gradient - reference).norm() / reference.norm()).item() <= BOUND


@pytest.mark.parametrize(
    ("settings", "loss_type", "batch_size"),
    [
        ({"loss_type": "sigmoid"}, ["sigmoid"], N_PAIRS),
        ({"loss_type": "sigmoid", "label_smoothing": 0.2}, ["aot"], 1),
        ({"loss_type": "sigmoid", "sft_weight": 0.7}, ["sigmoid", "sft"], 1),
        ({"loss_type": "robust", "label_smoothing": 0.1}, ["robust"], N_PAIRS),
        ({"loss_type": "ipo"}, ["ipo"], N_PAIRS),
        ({"loss_type": "hinge"}, ["hinge"], N_PAIRS),
    ],
    ids=str,
)
def test_dpo(models, tokenizer, tmp_path, settings, loss_type, batch_size):
    trainer = trainer_of(
        trl.DPOTrainer, trl.DPOConfig, models, tokenizer, tmp_path, beta=0.1, loss_type=loss_type,
        label_smoothing=settings.get("label_smoothing", 0.0), loss_weights=[1.0, 0.7][: len(loss_type)],
    )  # fmt: skip
    assert_equal(our_sum(models, pairs(), beta=0.1, **settings), trl_sum(trainer, pairs(), batch_size))


def with_prompt(example: dict) -> dict:
    """A pair as trl's older trainers take it: whole rows, the prompt's labels masked."""
    prompt, row = example["prompt_ids"], {}
    for side in ("chosen", "rejected"):
        ids = prompt + example[f"{side}_ids"]
        row[f"{side}_input_ids"], row[f"{side}_attention_mask"] = ids, [1] * len(ids)
        row[f"{side}_labels"] = [-100] * len(prompt) + example[f"{side}_ids"]
    return row


@pytest.mark.parametrize(
    "settings", [{}, {"label_smoothing": 0.1}, {"sft_weight": 0.7}], ids=["plain", "smoothed", "with likelihood"]
)
def test_simpo(models, tokenizer, tmp_path, settings):
    """SimPO is a loss of trl's CPO trainer; with its likelihood term this is CPO-SimPO."""
    sft_weight = settings.get("sft_weight", 0.0)
    trainer = trainer_of(
        cpo.CPOTrainer, cpo.CPOConfig, models, tokenizer, tmp_path, beta=2.0, loss_type="simpo", simpo_gamma=0.5,
        cpo_alpha=sft_weight, label_smoothing=settings.get("label_smoothing", 0.0),
    )  # fmt: skip
    theirs = trl_sum(trainer, [with_prompt(pair) for pair in pairs()], 1 if sft_weight else N_PAIRS)
    assert_equal(our_sum(models, pairs(), beta=2.0, loss_type="simpo", gamma=0.5, **settings), theirs)


def test_orpo(models, tokenizer, tmp_path):
    """trl's likelihood goes over the prompt too, the paper's over the reply: no difference for prompts of one token."""
    trainer = trainer_of(orpo.ORPOTrainer, orpo.ORPOConfig, models, tokenizer, tmp_path, beta=0.3)
    examples = pairs(prompt_len=1)
    theirs = trl_sum(trainer, [with_prompt(pair) for pair in examples], 1)
    assert_equal(our_sum(models, examples, beta=0.3, loss_type="orpo"), theirs)


@pytest.mark.parametrize("policy_is", [0, 1], ids=["a baseline above 0", "a baseline at 0"])
def test_kto(models, tokenizer, tmp_path, policy_is):
    models = models[policy_is], models[1 - policy_is]
    generator = torch.Generator().manual_seed(6)
    judged = [
        {"prompt_ids": pair["prompt_ids"], "completion_ids": pair[f"{side}_ids"], "label": side == "chosen"}
        for pair in pairs()
        for side in ("chosen", "rejected")
    ]
    order = torch.randperm(len(judged), generator=generator).tolist()
    judged = [judged[place] | {"KL_completion_ids": judged[place - 3]["completion_ids"]} for place in order]
    weights = {"desirable_weight": 1.2, "undesirable_weight": 0.7}
    trainer = trainer_of(trl.KTOTrainer, trl.KTOConfig, models, tokenizer, tmp_path, beta=0.1, **weights)
    theirs = trl_sum(trainer, judged, len(judged))

    prompts, replies, others, labels = columns(judged, "prompt_ids", "completion_ids", "KL_completion_ids", "label")
    with torch.no_grad():
        reference, _ = log_probs(models[1], prompts, replies)
        ratios = log_probs(models[0], prompts, others)[0] - log_probs(models[1], prompts, others)[0]
    baseline = kto_baseline(ratios.sum(), torch.tensor(len(judged)))
    assert (baseline.item() > 0) == (policy_is == 0)
    policy, _ = log_probs(models[0], prompts, replies)
    total, _ = kto_loss(policy, reference, torch.tensor(labels), baseline, beta=0.1, **weights)
    assert_equal((total, torch.autograd.grad(total, list(models[0].parameters()))), theirs)
