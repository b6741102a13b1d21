"""The public interface as typed code uses it. Never run: ``test_public_interface.py`` lets mypy read it."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from minillm.config import ModelConfig
from minillm.data import read_records
from minillm.evaluation import exact_match, perplexity
from minillm.hub import export_gguf, load_model, open_model, save_model
from minillm.inference import generate, stream
from minillm.lora import (
    apply_lora,
    disable_lora,
    load_lora,
    lora_parameters,
    merge_lora,
    remove_lora,
    save_lora,
    set_adapter,
    unmerge_lora,
)
from minillm.losses import (
    causal_lm_loss,
    cross_entropy,
    distill_loss,
    dpo_loss,
    kto_loss,
    linear_cross_entropy,
    linear_distill_loss,
    sequence_log_probs,
)
from minillm.model import KVCache, Transformer
from minillm.tokenizer import Tokenizer, load_tokenizer, train_bpe
from minillm.tokenizer.chat import encode_chat


def configuration(path: Path) -> None:
    config: ModelConfig = ModelConfig(hidden_size=64, num_hidden_layers=2)
    config = ModelConfig.preset("small")
    config = ModelConfig.from_hf(path)
    keys: dict = config.to_hf()
    print(keys)


def models(config: ModelConfig, path: Path, ids: Tensor) -> None:
    model: Transformer = Transformer(config)
    logits: Tensor = model(ids, cache=KVCache(config, batch_size=2, max_len=9))
    save_model(model, path)
    loaded: nn.Module = load_model(path, device="cpu")
    opened, tokenizer = open_model(path)
    text: str = tokenizer.decode([1, 2])
    print(logits, loaded, opened, text)


def tokenizers(path: Path) -> None:
    tokenizer: Tokenizer = load_tokenizer(path)
    ids: list[int] = tokenizer.encode("text")
    text: str = tokenizer.decode(ids)
    number: int = tokenizer.token_id("<|im_end|>")
    size: int = tokenizer.vocab_size
    trained: Tokenizer = train_bpe(iter([text]), vocab_size=size)
    chat_ids, mask = encode_chat(trained, [{"role": "user", "content": "hi"}], add_generation_prompt=True)
    print(number, chat_ids, mask)


def data(path: Path) -> None:
    for record in read_records(path):
        print(record)


def adapters(model: nn.Module, path: Path) -> None:
    apply_lora(model, rank=8, alpha=16, dropout=0.0, target_modules="all-linear")
    parameters: Iterator[nn.Parameter] | list[nn.Parameter] = lora_parameters(model)
    set_adapter(model, "default")
    with disable_lora(model):
        print(parameters)
    save_lora(model, path)
    load_lora(model, path)
    merge_lora(model)
    unmerge_lora(model)
    remove_lora(model)


def losses(model: nn.Module, batch: dict[str, Tensor], x: Tensor, targets: Tensor) -> None:
    pair: tuple[Tensor, Tensor] = causal_lm_loss(model, batch)
    pair = cross_entropy(x, targets)
    pair = linear_cross_entropy(x, x, targets)
    pair = sequence_log_probs(x, targets, targets)
    pair = dpo_loss(x, x, x, x, beta=0.1, loss_type="sigmoid")
    pair = kto_loss(x, x, targets, x, beta=0.1)
    pair = distill_loss(x, x, targets, temperature=2.0, divergence="forward")
    pair = linear_distill_loss(x, x, x, x, targets, alpha=0.5, temperature=2.0, divergence="forward")
    print(pair)


def answers(model: nn.Module, tokenizer: Tokenizer, path: Path) -> None:
    replies: list[list[int]] = generate(model, [[1, 2], [3]], max_new_tokens=4, temperature=0.0)
    for token in stream(model, [1, 2], tokenizer=tokenizer, max_new_tokens=4):
        print(token)
    scores = perplexity(model, ["text"], tokenizer)
    print(replies, scores, exact_match)


def export(path: Path) -> list[str]:
    return export_gguf(path, path / "model.gguf", dtype="q8_0", overwrite=True)
