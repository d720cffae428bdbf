"""Attach, detach, disabled: matching, freezing, hooks, precision, other libraries' wrappers."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from helpers_models import Block, Plain, latents, plain, randomise, sd15
from torch import Tensor, nn

from fera_ext import ops
from fera_ext.adapter import FeraAdapter, attach
from fera_ext.bands import Bands
from fera_ext.config import FeraConfig
from fera_ext.nn import FeraLinear

CONFIG = FeraConfig(target_modules=["to_q", "to_out.0"])


def _flags(model: nn.Module) -> list[bool]:
    return [p.requires_grad for p in model.parameters()]


# Matching.


def test_default_targets_take_all_attention_linears_of_a_unet() -> None:
    model = sd15().model
    adapter = attach(model)
    linears = [n for n, m in model.named_modules() if isinstance(m, FeraLinear)]
    assert adapter.matched == linears
    assert sum(n.endswith("to_out.0") for n in linears) == len(linears) // 4 == 8
    assert "32 of 50 linears of UNet2DConditionModel adapted" in adapter.report()
    assert "  to_out.0: 8" in adapter.report()
    assert repr(adapter).startswith("FeraAdapter(32 of 50")


def test_suffixes_match_whole_names_only() -> None:
    model = Plain()
    model.blocks[0].add_module("my_to_q", nn.Linear(16, 16))
    adapter = attach(model, FeraConfig(target_modules=["to_q", "1.to_out.0"]))
    assert adapter.matched == [
        "blocks.0.to_q",
        "blocks.1.to_q",
        "blocks.1.to_out.0",
        "blocks.2.to_q",
    ]


def test_a_string_is_a_regular_expression_for_the_whole_path() -> None:
    adapter = attach(Plain(), FeraConfig(target_modules=r"blocks\.[02]\.to_(q|out\.0)"))
    assert len(adapter.matched) == 4
    assert all(".1." not in p for p in adapter.matched)
    assert ": 4" in adapter.report().splitlines()[1]


def test_no_match_lists_near_names() -> None:
    model = sd15().model
    before = _flags(model)
    with pytest.raises(ValueError) as caught:
        attach(model, FeraConfig(target_modules=["to_querry", "to_out"[:5] + "t.00"]))
    text = str(caught.value)
    assert text.startswith("attach: target_modules must match linear layers of UNet2DConditionModel, got")
    assert "to_out.0" in text
    assert "near names" in text
    with pytest.raises(ValueError, match=r"near names: .*to_q"):
        attach(model, FeraConfig(target_modules="nothing"))
    with pytest.raises(ValueError, match=r"near names: .*to_k"):
        attach(model, FeraConfig(target_modules=["to_kk"]))
    assert _flags(model) == before
    assert not hasattr(model, "fera_router")


def test_model_without_linears() -> None:
    with pytest.raises(ValueError, match="attach: model must have linear layers, got Conv2d without any"):
        attach(nn.Conv2d(3, 3, 1))


def test_a_match_that_is_no_linear_is_named() -> None:
    with pytest.raises(ValueError, match=r"attach: blocks.0.to_out must be a linear layer .* got ModuleList"):
        attach(Plain(), FeraConfig(target_modules=["to_out"]))
    with pytest.raises(ValueError, match=r"it contains blocks.0.to_out.0"):
        attach(Plain(), FeraConfig(target_modules=["to_out"]))
    with pytest.raises(ValueError, match=r"attach: inp must be a linear layer .* got Conv2d"):
        attach(Plain(), FeraConfig(target_modules=["inp", "to_q"]))


def test_a_linear_whose_parent_reads_its_weight_is_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match=r"0.out_proj must be a linear that its parent calls"):
        attach(model, FeraConfig(target_modules=["out_proj"]))


def test_a_target_that_matches_nothing_beside_others_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="match no layer: to_k, to_v$"):
        attach(Plain())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attach(Plain(), CONFIG)


def test_a_linear_reachable_by_two_paths_is_one_layer() -> None:
    model = Plain()
    model.blocks[1].to_q = model.blocks[0].to_q
    state = model.state_dict()
    adapter = attach(model, CONFIG)
    assert model.blocks[1].to_q is model.blocks[0].to_q
    assert len(adapter.matched) == 6
    assert len({id(p) for p in adapter.parameters()}) == 4 + 5 * 2
    assert len(list(adapter.parameters())) == 4 + 5 * 2
    adapter.detach()
    assert list(model.state_dict()) == list(state)
    assert model.blocks[1].to_q is model.blocks[0].to_q


# What may be attached to.


def test_twice_is_an_error() -> None:
    model = Plain()
    adapter = attach(model, CONFIG)
    with pytest.raises(ValueError, match="attach: model must have no adapter, got a Plain with one attached"):
        attach(model, FeraConfig(target_modules=["out"]))
    with pytest.raises(ValueError, match="must have no adapter"):
        attach(nn.Sequential(model), CONFIG)
    adapter.detach()
    attach(model, CONFIG)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (object(), "attach: model must be a torch.nn.Module, .* got object"),
        (
            torch.compile(Plain(), backend="eager"),
            "attach: model must be the denoiser itself .* OptimizedModule",
        ),
    ],
)
def test_what_is_no_denoiser(model: Any, text: str) -> None:
    with pytest.raises(TypeError, match=text):
        attach(model)


def test_dtype_and_router_name() -> None:
    with pytest.raises(ValueError, match=r"attach: dtype must be a floating dtype, got torch.int64"):
        attach(Plain(), CONFIG, dtype=torch.int64)
    model = Plain()
    model.fera_router = nn.Identity()
    with pytest.raises(ValueError, match="attach: model must have no attribute fera_router"):
        attach(model, CONFIG)


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = Plain()
    model.blocks[2].to_q = nn.Linear(16, 16, device="meta")
    flags, keys = _flags(model), list(model.state_dict())
    with pytest.raises(ValueError, match=r"blocks.2.to_q must be on a real device"):
        attach(model, CONFIG)
    assert _flags(model) == flags
    assert list(model.state_dict()) == keys
    assert not model._forward_pre_hooks
    assert not model._forward_hooks


# Parameters.


def test_base_is_frozen_and_the_adapter_trains() -> None:
    model = Plain()
    adapter = attach(model, CONFIG)
    asking = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(asking) == 4 + 6 * 2
    assert all("lora" in n or "fera_router" in n for n in asking)
    assert {id(p) for p in adapter.parameters()} == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in adapter.parameters())


def test_dtype_of_the_experts() -> None:
    adapter = attach(Plain().to(torch.bfloat16), CONFIG, dtype=torch.bfloat16)
    dtypes = {n.partition(".")[0]: p.dtype for n, p in adapter.named_parameters()}
    assert dtypes == {"router": torch.float32, "layers": torch.bfloat16}


def test_state_dict_is_strict() -> None:
    adapter, other = attach(Plain(), CONFIG), attach(Plain(), CONFIG)
    randomise(other)
    state = other.state_dict()
    adapter.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in adapter.state_dict().items())
    before = {k: v.clone() for k, v in adapter.state_dict().items()}
    key = "layers.blocks.0.to_q.lora_A"
    for bad, text in (
        ({k: v for k, v in state.items() if k != key}, f"missing {key}"),
        ({**state, "extra": state[key]}, "unknown extra"),
        (
            {**state, key: state[key][:, :2]},
            rf"{key} must be of shape \(3, 4, 16\), got \(3, 2, 16\)",
        ),
        ({**state, key: state[key].double()}, f"{key} must be torch.float32, got torch.float64"),
    ):
        with pytest.raises(ValueError, match=text):
            adapter.load_state_dict({k: v + 1 for k, v in bad.items()})
        assert all(torch.equal(v, before[k]) for k, v in adapter.state_dict().items())


def test_training_mode_follows_the_model() -> None:
    model = Plain().eval()
    adapter = attach(model, CONFIG)
    assert not any(layer.training for layer in adapter.layers.values())
    assert not adapter.router.training
    model.train()
    assert all(layer.training for layer in adapter.layers.values())
    assert adapter.router.training


def test_one_training_step_lowers_the_loss_and_moves_the_router() -> None:
    case = plain(4)
    adapter = attach(case.model, CONFIG)
    target = torch.randn_like(case.latent)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
    losses, router = [], adapter.router.w2.detach().clone()
    for _ in range(20):
        with torch.no_grad(), adapter.disabled():
            base = case.run()
        out = case.run()
        loss = (out - target).square().mean() + adapter.fecl_loss(base, out, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert not torch.equal(adapter.router.w2, router)


def test_fecl_is_weighted() -> None:
    case = plain()
    adapter = attach(case.model, FeraConfig(target_modules=["to_q"], fecl_weight=0.25))
    a, b, c = torch.randn(3, *case.latent.shape).unbind()
    torch.testing.assert_close(adapter.fecl_loss(a, b, c), 0.25 * ops.fecl_loss(a, b, c, adapter.config.bands))


# Off and away.


def test_detach_gives_the_model_back() -> None:
    case = sd15()
    first = next(case.model.parameters())
    first.requires_grad_(False)
    flags, keys, want = _flags(case.model), list(case.model.state_dict()), case.run()
    adapter = attach(case.model)
    randomise(adapter)
    assert not torch.equal(case.run(), want)
    adapter.detach()
    adapter.detach()
    assert torch.equal(case.run(), want)
    assert _flags(case.model) == flags
    assert list(case.model.state_dict()) == keys
    assert not case.model._forward_pre_hooks
    assert not case.model._forward_hooks
    assert "detached" in adapter.report()


def test_disabled_is_bit_identical_nests_and_survives_errors() -> None:
    case = plain()
    want = case.run()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    on = case.run()
    gate = adapter.gate
    with adapter.disabled():
        with adapter.disabled():
            assert torch.equal(case.run(), want)
        assert torch.equal(case.run(z=case.latent), want)
        case.run(z=latents(2, 4, 8, 12, seed=5))
        with pytest.raises(KeyError), adapter.disabled():
            raise KeyError
        assert torch.equal(case.run(), want)
    assert adapter.gate is gate
    assert torch.equal(case.run(), on)


def test_disabled_computes_no_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    case = plain()
    adapter = attach(case.model, CONFIG)
    case.run()

    def fail(*args: Any) -> Tensor:
        raise AssertionError("a gate was computed")

    monkeypatch.setattr(ops, "latent_gate", fail)
    with adapter.disabled():
        case.run()
        # Not even where there would be no latent.
        with pytest.raises(RuntimeError, match="conv2d"):
            case.model(torch.zeros(3))


def test_a_failed_forward_does_not_poison_the_next() -> None:
    case = plain()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    want = case.run()
    with pytest.raises(RuntimeError):
        case.run(z=torch.randn(2, 5, 8, 12))
    assert torch.equal(case.run(), want)


def test_layers_refuse_to_run_outside_the_denoiser() -> None:
    case = plain()
    attach(case.model, CONFIG)
    case.run()
    with pytest.raises(RuntimeError, match="gate must be computed by a call of the denoiser"):
        case.model.blocks[0](torch.randn(2, 5, 16))


# Precision and other libraries.


def test_autocast_keeps_the_gate() -> None:
    case = sd15()
    adapter = attach(case.model)
    randomise(adapter)
    want = case.run()
    gate = adapter.gate
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run()
    assert adapter.gate is not None
    assert torch.equal(adapter.gate, gate)
    assert (got.float() - want).norm() < 3e-2 * want.norm()
    got.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


@pytest.mark.parametrize("cast", ["before", "after"])
def test_half_precision_model(cast: str) -> None:
    case = plain()
    adapter = attach(case.model.to(torch.bfloat16) if cast == "before" else case.model, CONFIG)
    randomise(adapter)
    case.model.to(torch.bfloat16) if cast == "after" else None
    out = case.run(z=case.latent.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16
    assert adapter.gate is not None
    assert adapter.gate.dtype == torch.float32
    out.float().square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())


def test_a_copied_model_is_on_its_own() -> None:
    case = plain()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    want = case.run()
    twin = copy.deepcopy(case.model)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.zero_()
    assert torch.equal(twin(case.latent), want)
    with adapter.disabled():
        assert torch.equal(twin(case.latent), want)


def test_weights_offloaded_after_attaching() -> None:
    accelerate = pytest.importorskip("accelerate")
    case = plain()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    with torch.no_grad():
        want = case.run()
        accelerate.cpu_offload(case.model, execution_device=torch.device("cpu"))
        assert case.model.fera_router.w1.is_meta
        torch.testing.assert_close(case.run(), want)


@pytest.mark.slow
def test_compiled_as_one_graph() -> None:
    case = sd15()
    adapter = attach(case.model)
    randomise(adapter)
    want = case.run()
    want.square().mean().backward()
    grads = {n: p.grad for n, p in adapter.named_parameters()}
    torch._dynamo.reset()
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    for parameter in adapter.parameters():
        parameter.grad = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = compiled(**case.inputs).sample
    torch.testing.assert_close(got, want)
    got.square().mean().backward()
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name])
    with torch.no_grad(), adapter.disabled():
        torch.testing.assert_close(compiled(**case.inputs).sample, case.run())
    case.model.enable_gradient_checkpointing()
    for parameter in adapter.parameters():
        parameter.grad = None
    compiled(**case.inputs).sample.square().mean().backward()
    for name, parameter in adapter.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name])


def test_compiled_blocks_under_eager_hooks() -> None:
    case = plain()
    adapter = attach(case.model, CONFIG)
    randomise(adapter)
    other = latents(2, 4, 8, 12, seed=5)
    want = case.run(), case.run(z=other)
    torch._dynamo.reset()
    for block in case.model.blocks:
        block.compile(fullgraph=True, backend="eager")
    torch.testing.assert_close((case.run(), case.run(z=other)), want)


# Configuration.


def test_config_defaults_and_round_trip() -> None:
    config = FeraConfig()
    assert config.target_modules == ["to_q", "to_k", "to_v", "to_out.0"]
    assert (config.rank, config.lora_alpha, config.num_experts, config.fecl_weight) == (
        4,
        1.0,
        3,
        0.1,
    )
    assert config.scale == 0.25
    assert config.bands == Bands.dog(3)
    assert FeraConfig.from_dict(config.to_dict()) == config
    assert config.override(rank=8).rank == 8
    assert config.rank == 4


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"rank": 0}, "rank must be an integer from 1 to 512, got 0"),
        ({"rank": True}, "rank must be an integer"),
        ({"rank": 2.0}, "rank must be an integer"),
        ({"num_experts": 33}, "num_experts must be an integer from 1 to 32, got 33"),
        ({"num_experts": 32, "rank": 17}, r"num_experts \* rank must be at most 512, got 32 \* 17"),
        ({"router_hidden": 300}, "router_hidden must be an integer from 1 to 256, got 300"),
        ({"lora_alpha": 0.0}, "lora_alpha must be a finite number, positive, got 0.0"),
        ({"lora_alpha": float("inf")}, "lora_alpha must be a finite number"),
        ({"router_tau": -1.0}, "router_tau must be a finite number, positive, got -1.0"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be a finite number, in \[0, 1\), got 1.0"),
        ({"fecl_weight": -0.1}, "fecl_weight must be a finite number, non-negative, got -0.1"),
        ({"bands": "dog"}, "bands must be a Bands, got 'dog'"),
        ({"target_modules": []}, r"target_modules must be a list of path suffixes .* got \[\]"),
        ({"target_modules": ["to_q", 3]}, "target_modules must be a list"),
        ({"target_modules": "("}, "target_modules must be a valid regular expression"),
    ],
)
def test_config_errors(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match="^FeraConfig: " + text):
        FeraConfig(**changes)


def test_config_fields() -> None:
    data = FeraConfig().to_dict()
    with pytest.raises(ValueError, match=r"fields must be exactly .* got missing rank; unknown rnk"):
        FeraConfig.from_dict({**{k: v for k, v in data.items() if k != "rank"}, "rnk": 4})
    with pytest.raises(ValueError, match=r"fields must be among .* got alpha"):
        FeraConfig().override(alpha=2.0)


def test_public_names() -> None:
    assert isinstance(attach(nn.Sequential(Block(4)), CONFIG), FeraAdapter)
