"""``--compile``: how many graphs, and the same numbers. The backend counts graphs and runs them as they are."""

import pytest
import torch
import torch._dynamo

import train_lora
import train_pretrain
import train_sft
from minillm.checkpoints.directory import is_earlier
from minillm.config import ModelConfig
from minillm.data.batches import document_bounds
from minillm.inference import generate
from minillm.kernels import compiled, varlen_attention
from minillm.kernels.compiled import compile_blocks
from minillm.kernels.varlen_attention import Documents
from minillm.lora import apply_lora
from minillm.losses import causal_lm_loss
from minillm.model import Transformer
from minillm.model.attention_plan import AttentionPlan, document_mask
from minillm.model.moe import Routing
from minillm.model.rope import rope_tables
from minillm.reports.tracking import read_metrics
from tests.stages.conftest import call, flags, make_world, tiny_tokenizer, world  # noqa: F401 - fixtures

V, N_BLOCKS = 64, 2


@pytest.fixture
def graphs(monkeypatch):
    """Node counts of the graphs that were compiled."""
    compiled_graphs = []

    def backend(graph, example_inputs):
        compiled_graphs.append(len(graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", backend)
    config = torch._dynamo.config
    limits = config.recompile_limit, config.accumulated_recompile_limit
    torch._dynamo.reset()
    yield compiled_graphs
    config.recompile_limit, config.accumulated_recompile_limit = limits
    torch._dynamo.reset()


def make_model(num_hidden_layers=N_BLOCKS):
    torch.manual_seed(0)
    shape = {"vocab_size": V, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return Transformer(ModelConfig(**shape, num_hidden_layers=num_hidden_layers)).train()


def make_batch(n_rows, seq_len):
    ids = torch.randint(V, (n_rows, seq_len + 1), generator=torch.Generator().manual_seed(seq_len))
    document_ids = (torch.arange(seq_len) // 5).expand(n_rows, seq_len)
    return {"input_ids": ids[:, :-1], "targets": ids[:, 1:], "document_ids": document_ids}


def loss_and_gradients(model, batch):
    loss_sum, n_targets = causal_lm_loss(model, batch)
    loss_sum.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return (loss_sum / n_targets).item(), gradients


@pytest.mark.parametrize("kind", ["plain", "checkpointing", "lora"])
def test_ragged_rows_take_few_graphs_and_the_same_numbers(graphs, kind):
    n_blocks = 1 if kind == "lora" else N_BLOCKS
    models = [make_model(n_blocks), make_model(n_blocks)]
    for model in models:
        if kind == "lora":
            targets = ("q_proj", "down_proj")
            apply_lora(model, rank=4, target_modules=targets, generator=torch.Generator().manual_seed(1))
        model.gradient_checkpointing = kind == "checkpointing"
    compile_blocks(models[0])
    for seq_len in (32, 32, 40, 17, 64, 9, 11):
        ours, wanted = (loss_and_gradients(model, make_batch(2, seq_len)) for model in models)
        assert ours[0] == pytest.approx(wanted[0], rel=1e-5)
        for name, gradient in wanted[1].items():
            assert (ours[1][name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name
    n_train = len(graphs)
    assert n_train == 2  # of the first length, and of any: blocks share them

    for model in models:
        model.eval()
    with torch.no_grad():
        for shape in ((2, 32), (2, 11), (2, 17), (3, 5), (3, 8)):
            ours, wanted = (causal_lm_loss(model, make_batch(*shape))[0] for model in models)
            assert ours.item() == pytest.approx(wanted.item(), rel=1e-5)
    n_all = len(graphs)
    assert n_all - n_train <= 3

    prompts = [[1, 2, 3], [4]]
    ours, wanted = (generate(model, prompts, max_new_tokens=20, temperature=0) for model in models)
    assert ours == wanted
    assert len(graphs) == n_all  # decoding runs uncompiled
    models[0].train()
    loss_and_gradients(models[0], make_batch(2, 32))
    assert len(graphs) == n_all  # and leaves what was compiled for training


def test_decoding_a_model_compiled_whole_compiles_nothing(graphs):
    model = make_model().eval()
    wanted = generate(model, [[1, 2]], max_new_tokens=8, temperature=0)
    model.compile(backend=compiled.BACKEND)
    assert generate(model, [[1, 2]], max_new_tokens=8, temperature=0) == wanted
    assert graphs == []


def test_the_limit_is_enough_for_adapted_blocks(graphs):
    model = make_model(num_hidden_layers=24)
    compile_blocks(model)
    assert torch._dynamo.config.recompile_limit >= compiled.GRAPHS_PER_BLOCK * 24


@pytest.mark.parametrize("documents", ["causal", "mask", "documents"])
@pytest.mark.parametrize("settings", [{}, {"use_qk_norm": True}, {"sliding_window": 4}], ids=str)
def test_a_block_is_one_graph_of_plain_expressions(settings, documents):
    """``fullgraph`` raises at a break. The graph is not run: the kernel for documents needs a GPU."""
    shape = {"vocab_size": V, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = ModelConfig(**shape, num_hidden_layers=1, **settings)
    if documents == "documents" and not varlen_attention._torch_has_it():
        pytest.skip("this torch has no such attention")
    block, x = Transformer(config).train().model.layers[0], torch.randn(2, 12, 32, requires_grad=True)
    ids = torch.arange(12).expand(2, 12) // 5
    plan = {
        "causal": AttentionPlan(is_causal=True),
        "mask": AttentionPlan(mask=document_mask(ids, config.sliding_window)),
        "documents": AttentionPlan(documents=Documents(document_bounds(ids), 12, config.sliding_window)),
    }[documents]
    traced = []

    def backend(graph, example_inputs):
        traced.append(graph)
        return lambda *args: (torch.zeros_like(x),)

    torch._dynamo.reset()
    rope = rope_tables(torch.arange(12)[None], config, dtype=torch.float32)
    torch.compile(block, backend=backend, fullgraph=True)(x, rope, plan, None, Routing())
    (graph,) = traced
    operators = [str(node.target) for node in graph.graph.nodes if node.op in ("call_function", "get_attr")]
    assert not [name for name in operators if "autograd_function" in name or "fwd_body" in name]
    assert ("varlen" in " ".join(operators)) == (documents == "documents")
    torch._dynamo.reset()


def test_any_number_of_documents_is_one_graph_more():
    if not varlen_attention._torch_has_it():
        pytest.skip("this torch has no such attention")
    config = make_model(1).config
    block, x = make_model(1).model.layers[0], torch.randn(2, 24, 32, requires_grad=True)
    rope = rope_tables(torch.arange(24)[None], config, dtype=torch.float32)
    traced = []

    def backend(graph, example_inputs):
        traced.append(graph)
        return lambda *args: (torch.zeros_like(x),)

    torch._dynamo.reset()
    compiled_block = torch.compile(block, backend=backend)
    for length in (3, 24, 5, 8, 2, 11):
        bounds = document_bounds(torch.arange(24).expand(2, 24) // length)
        compiled_block(x, rope, AttentionPlan(documents=Documents(bounds, 24)), None, Routing())
    assert len(traced) == 2
    torch._dynamo.reset()


def test_auto_compiles_on_cuda_where_it_can(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: name == "triton" or None)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: "/usr/bin/gcc" if name == "gcc" else None)
    monkeypatch.delenv("CC", raising=False)
    assert compiled.is_wanted("auto", cuda)
    assert not compiled.is_wanted("auto", cpu)
    assert not compiled.is_wanted("auto", torch.device("mps"))
    assert not compiled.is_wanted("auto", cuda, parallel="deepspeed")
    assert compiled.is_wanted("1", cpu)
    assert not compiled.is_wanted("0", cuda)
    monkeypatch.setattr(compiled.shutil, "which", lambda name: None)
    assert not compiled.is_wanted("auto", cuda)
    monkeypatch.setenv("CC", "clang")
    assert compiled.is_wanted("auto", cuda)
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    assert not compiled.is_wanted("auto", cuda)


STAGES = {
    "sft": (train_sft, "chat", ["--packing", "none", "--from_weight", "pretrain"]),
    "lora": (
        train_lora,
        "chat",
        ["--packing", "none", "--from_weight", "pretrain", "--lora_name", "x", "--target_modules", "q_proj"],
    ),
}


@pytest.fixture
def base(world, call):  # noqa: F811
    common = ["--max_seq_len", "48", "--batch_size", "4", "--learning_rate", "1e-3"]
    result = call(train_pretrain.main, world, *common, "--data_path", str(world.text), "--max_steps", "1")
    assert result.code == 0, result.err
    return common


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_compiled_in_few_graphs(stage, world, call, base, graphs):  # noqa: F811
    """Training, validation, samples at the end; in ``sft`` and ``lora`` every row has its own length."""
    train, data, more = STAGES[stage]
    argv = [*base, *more, "--data_path", str(getattr(world, data)),
            "--valid_path", str(getattr(world, f"{data}_valid")),
            "--max_steps", "4", "--eval_interval", "2", "--log_interval", "1", "--overwrite"]  # fmt: skip
    losses = []
    for compile_flags in ([], ["--compile"]):
        result = call(train.main, world, *argv, *compile_flags)
        assert result.code == 0, result.err
        paths = [path for path in world.out.rglob("metrics.jsonl") if not is_earlier(path)]
        metrics = {path: path.stat().st_mtime_ns for path in paths}
        losses.append([row["loss"] for row in read_metrics(max(metrics, key=metrics.get))])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    n_codes = 2 if stage == "lora" else 1  # plain blocks share their graphs, adapted ones do not
    assert 2 * n_codes <= len(graphs) <= 5 * n_codes
