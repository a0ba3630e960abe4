"""Bad inputs by section: the program before them, and one line of code each that has to raise."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["SECTIONS", "Section"]


class Section(NamedTuple):
    """Bad inputs that share a setup.

    `watched` is an expression for everything that a rejected line must leave as it was.
    """

    title: str
    setup: str
    watched: str
    lines: str


OPTIMIZER = """
import numpy as np
import lars_array as la
from lars_array import LARS
params = {"w": np.ones((2, 3)), "b": np.full(3, 0.5)}
"""

STEPPED = (
    OPTIMIZER
    + """
opt = LARS(params, lr=0.1, momentum=0.9, weight_decay=1e-4)
g = {"w": np.full((2, 3), 0.1), "b": np.full(3, 0.2)}
opt.step(g)
saved = opt.state_dict()
loaded = lambda **changes: opt.load_state_dict(saved | changes)
group = lambda **changes: loaded(param_groups=[saved["param_groups"][0] | changes])
own = lambda **changes: loaded(state=saved["state"] | {"w": saved["state"]["w"] | changes})
def set_group(**options): opt.param_groups[0].update(options); opt.step(g)
"""
)

FUNCTIONS = (
    OPTIMIZER
    + """
from lars_array import init, update, lars_step, sums, apply
grads = {"w": np.full((2, 3), 0.1), "b": np.full(3, 0.2)}
state = init(params)
up = lambda **options: update(params, grads, state, **({"lr": 0.1} | options))
half = np.ones(3, np.float16)
p, g, v = np.ones(3), np.full(3, 0.1), np.zeros(3)
"""
)

TORCH = """
import torch, lars_torch
from lars_torch import LARS, param_groups
model = torch.nn.Linear(3, 2)
opt = LARS(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
def fill(): [setattr(p, "grad", torch.full_like(p, 0.1)) for p in model.parameters()]
fill(); opt.step(); fill()
saved = opt.state_dict()
def set_grad(g): model.weight.grad = g; opt.step()
def set_group(**options): opt.param_groups[0].update(options); opt.step()
new = lambda **options: LARS(model.parameters(), **({"lr": 0.1} | options))
"""

JAX = """
import jax, jax.numpy as jnp, optax, lars_jax
from lars_jax import lars, LARS
params = {"w": jnp.ones((2, 3)), "b": jnp.full(3, 0.5)}
g = {"w": jnp.full((2, 3), 0.1), "b": jnp.full(3, 0.2)}
solver = lars(0.1, weight_decay=1e-4)
state = solver.init(params)
opt = LARS(params, lr=0.1, momentum=0.9, weight_decay=1e-4)
opt.step(g)
saved = opt.state_dict()
"""

SECTIONS = [
    Section(
        "Parameters",
        OPTIMIZER,
        "params",
        """
LARS([], lr=0.1)
LARS({}, lr=0.1)
LARS(None, lr=0.1)
LARS(3, lr=0.1)
LARS("weights", lr=0.1)
LARS([1.0, 2.0], lr=0.1)
LARS([[1.0, 2.0]], lr=0.1)
LARS(np.ones(3), lr=0.1)
LARS({"w": np.ones(3, int)}, lr=0.1)
LARS({"w": np.ones(3, bool)}, lr=0.1)
LARS({"w": np.array(["a"])}, lr=0.1)
LARS({"w": np.array([None])}, lr=0.1)
LARS({"w": np.float64(1)}, lr=0.1)
LARS({1: np.ones(3)}, lr=0.1)
LARS({"w": {"inner": np.ones(3)}}, lr=0.1)
LARS([("w", np.ones(3)), ("w", np.ones(3))], lr=0.1)
LARS([("w", np.ones(3)), np.ones(3)], lr=0.1)
LARS([params["w"], params["w"]], lr=0.1)
LARS([params["w"], params["w"][0]], lr=0.1)
LARS({"w": np.broadcast_to(np.ones(1), (3,))}, lr=0.1)
LARS({"w": memoryview(b"abc")}, lr=0.1)
LARS([{"params": [params["w"]]}, params["b"]], lr=0.1)
LARS([{"parameters": [params["w"]]}], lr=0.1)
LARS([{"params": []}], lr=0.1)
LARS([{"params": [params["w"]], "names": ["a", "b"]}], lr=0.1)
LARS([{"params": [params["w"]]}, {"params": [params["w"]]}], lr=0.1)
LARS([{"params": {"w": params["w"]}}, {"params": {"w": params["b"]}}], lr=0.1)
""",
    ),
    Section(
        "Hyper-parameters",
        OPTIMIZER,
        "params",
        """
LARS(params)
LARS(params, lr=-0.1)
LARS(params, lr="0.1")
LARS(params, lr=None)
LARS(params, lr=float("nan"))
LARS(params, lr=float("inf"))
LARS(params, lr=True)
LARS(params, lr=1j)
LARS(params, lr=[0.1])
LARS(params, lr=np.ones(2))
LARS(params, 0.1, momentum=-1)
LARS(params, 0.1, momentum=float("nan"))
LARS(params, 0.1, momentum="high")
LARS(params, 0.1, dampening=None)
LARS(params, 0.1, dampening=float("inf"))
LARS(params, 0.1, weight_decay=-1e-4)
LARS(params, 0.1, weight_decay=float("inf"))
LARS(params, 0.1, weight_decay={"w": 1})
LARS(params, 0.1, nesterov=True)
LARS(params, 0.1, momentum=0.9, dampening=0.1, nesterov=True)
LARS(params, 0.1, nesterov="yes")
LARS(params, 0.1, trust_coefficient=-0.001)
LARS(params, 0.1, trust_coefficient=float("nan"))
LARS(params, 0.1, eps=-1e-8)
LARS(params, 0.1, eps="small")
LARS(params, 0.1, rule="flsh")
LARS(params, 0.1, rule=None)
LARS(params, 0.1, rule=3)
LARS(params, 0.1, trust_clip=2)
LARS(params, 0.1, trust_bounds=(2.0, 1.0))
LARS(params, 0.1, trust_bounds=1.0)
LARS(params, 0.1, trust_bounds=(0.0,))
LARS(params, 0.1, trust_bounds=(-1.0, 1.0))
LARS(params, 0.1, trust_bounds=(0.0, float("nan")))
LARS(params, 0.1, always_adapt="no")
LARS(params, 0.1, adapt=None)
LARS(params, 0.1, maximize=1.5)
LARS(params, 0.1, rescale_grad=float("nan"))
LARS(params, 0.1, rescale_grad="1/128")
LARS(params, 0.1, max_grad_norm=-1)
LARS(params, 0.1, max_grad_norm=0)
LARS(params, 0.1, max_grad_norm="1")
LARS(params, 0.1, nonfinite="ignore")
LARS(params, 0.1, nonfinite=None)
LARS(params, 0.1, layer_axes=-1)
LARS(params, 0.1, layer_axes=3)
LARS(params, 0.1, layer_axes=1.0)
LARS(params, 0.1, layer_of=3)
LARS(params, 0.1, layer_of={"x": "layer"})
LARS(params, 0.1, master_weights="yes")
LARS(params, 0.1, kernel="fast")
LARS(params, 0.1, kernel="cuda")
LARS(params, 0.1, all_reduce="mpi")
LARS(params, 0.1, layers=["w", "b"])
LARS(params, 0.1, weight_deacy=1e-4)
LARS(params, 0.1, betas=(0.9, 0.999))
LARS(params, 0.1, trust_coeff=0.001)
LARS(params, 0.1, weight_decay_filter=None)
LARS([{"params": params, "learning_rate": 0.1}], lr=0.1)
LARS([{"params": params, "max_grad_norm": 1.0}, {"params": {"c": np.ones(2)}, "max_grad_norm": -1}], lr=0.1)
setattr(LARS(params, 0.1), "lr", 0.2)
""",
    ),
    Section(
        "Gradients and steps",
        STEPPED,
        "params, opt.state_dict()",
        """
opt.step()
opt.step(None)
opt.step(3)
opt.step("gradients")
opt.step([g["w"]])
opt.step([g["w"], g["b"], g["b"]])
opt.step({"w": g["w"]})
opt.step(g | {"c": g["b"]})
opt.step({"W": g["w"], "b": g["b"]})
opt.step(g | {"w": g["w"].T})
opt.step(g | {"w": np.ones((2, 3, 1))})
opt.step(g | {"w": np.ones(())})
opt.step(g | {"w": 0.1})
opt.step(g | {"w": [[0.1] * 3] * 2})
opt.step(g | {"w": np.ones((2, 3), int)})
opt.step(g | {"w": np.ones((2, 3), bool)})
opt.step(g | {"w": np.ones((2, 3), complex)})
opt.step(g | {"w": np.full((2, 3), "a")})
opt.step(g | {"w": params["w"]})
opt.step(g | {"b": params["w"][0]})
opt.step(g | {"w": np.full((2, 3), np.nan)})
opt.step(g | {"w": np.full((2, 3), np.inf)})
opt.step(g | {"b": np.full(3, -np.inf)})
opt.step(g | {"b": np.array([0.1, np.nan, np.inf])})
opt.step(g | {"w": np.full((2, 3), 1e200)})
opt.step(g, found_inf="no")
opt.step(g, found_inf=np.zeros(2))
opt.step(g, found_inf=[0.0])
opt.step(g, closure=3)
opt.step(closure=lambda: 1.0)
opt.step(closure=lambda: None)
opt.step(closure=lambda: (1.0, {"w": g["w"]}))
opt.step(g, closure=lambda: (1.0, g))
""",
    ),
    Section(
        "Groups that were changed",
        STEPPED,
        "params, opt.steps, opt.state_views()",
        """
set_group(lr=-1)
set_group(lr="fast")
set_group(lr=lambda step: "fast")
set_group(lr=lambda step: float("nan"))
set_group(lr=lambda step: 1 / 0)
set_group(lr=lambda: 0.1)
set_group(momentum=-0.1)
set_group(nesterov=True, momentum=0)
set_group(rule="flush")
set_group(nonfinite="warn")
set_group(layer_axes=1)
set_group(weight_deacy=0.1)
opt.param_groups[0].pop("momentum"); opt.step(g)
opt.add_param_group({"params": []})
opt.add_param_group([np.ones(2)])
opt.add_param_group({"params": {"w": np.ones(2)}})
opt.add_param_group({"params": {"c": params["w"]}})
opt.add_param_group({"params": {"c": np.ones(2)}, "lr": -1})
opt.add_param_group({"params": {"c": np.ones(2)}, "rule": "lasr"})
opt.add_param_group({"params": {"c": np.ones(2, int)}})
""",
    ),
    Section(
        "State dicts",
        STEPPED,
        "params, opt.steps, opt.state_views()",
        """
opt.load_state_dict(None)
opt.load_state_dict([])
opt.load_state_dict({})
opt.load_state_dict({"state": {}, "param_groups": [{"params": [0, 1], "lr": 0.1}]})
loaded(steps=-1)
loaded(steps=1.5)
loaded(steps="1")
loaded(skipped_steps=None)
loaded(version=3)
loaded(param_groups=[])
loaded(param_groups={})
loaded(param_groups=[{}])
loaded(state={})
loaded(state=[])
group(lr=-1)
group(lr="0.1")
group(rule="flsh")
group(names=["w"])
group(names=["w", "c"])
group(names=["b", "w"])
group(names="wb")
group(nonfinite="never")
group(momentum=float("nan"))
own(momentum_buffer=np.ones(3))
own(momentum_buffer=np.ones((3, 2)))
own(momentum_buffer=np.ones((2, 3), np.float32))
own(momentum_buffer=np.ones((2, 3), int))
own(momentum_buffer=1.0)
own(momentum_buffer=[[0.0] * 3] * 2)
own(master=np.ones((2, 3)))
own(previous_lr=-1)
own(previous_lr="0.1")
own(previous_lr=float("nan"))
own(exp_avg=np.ones((2, 3)))
loaded(state=saved["state"] | {"c": saved["state"]["b"]})
opt.attach_state({"c": {}})
opt.attach_state({"w": {"momentum_buffer": np.ones(3)}})
opt.attach_state({"w": {"momentum_buffer": params["w"]}})
opt.attach_state(None)
""",
    ),
    Section(
        "Functions",
        FUNCTIONS,
        "params, grads, p, g, v",
        """
init(None)
init([])
init({"w": np.ones(3, int)})
init({1: np.ones(3)})
update(params, grads, None, lr=0.1)
update(params, grads, {}, lr=0.1)
update(params, grads, state)
update(params, {"w": grads["w"]}, state, lr=0.1)
update(params, grads | {"c": grads["b"]}, state, lr=0.1)
update({"w": params["w"]}, {"w": grads["w"]}, state, lr=0.1)
update(params, grads | {"w": np.ones(3)}, state, lr=0.1)
up(lr=-1)
up(momentum="0.9")
up(rule="flsh")
up(nonfinite="ignore")
up(layer_axes=5)
update({"h": half}, {"h": half}, init({"h": half}), lr=0.1, master_weights=True)
up(kernel="compiled")
lars_step(p, g, v)
lars_step(p, g[:2], v, lr=0.1)
lars_step(p, g, v[:2], lr=0.1, momentum=0.9)
lars_step(1.0, 0.1, lr=0.1)
lars_step(p, g, v, lr=-1)
lars_step(p, g, v, lr=0.1, nesterov=True)
lars_step(p, g, v, lr=0.1, trust_coeff=1)
lars_step(p, np.full(3, np.nan), v, lr=0.1, nonfinite="raise")
lars_step(p, g, v, lr=0.1, momentum=0.9, rule="nvidia", previous_lr=-1.0)
LARS(la.param_groups(params, weight_decay=-1), lr=0.1)
la.param_groups(params, weight_decay=1e-4, no_decay=3)
la.param_groups(params, weight_decay=1e-4, no_decay="(")
la.param_groups(None, weight_decay=1e-4)
la.preset("resnet")
la.preset(None)
la.register("flash")(lambda s, h, xp: None)
la.register()(lambda s, h, xp: None)
la.register("mine", norm_of="weights")(lambda s, h, xp: None)
la.register("mine")(3)
la.warmup_cosine(-1, 100)
la.warmup_cosine(0.1, 0)
la.warmup_cosine(0.1, 100, warmup_steps=200)
la.warmup_cosine(0.1, 10.5)
la.warmup_cosine(0.1, 100)(-1)
la.warmup_cosine(0.1, 100)(0.5)
la.warmup_polynomial(0.1, 100, power=-2)
la.warmup_polynomial("0.1", 100)
la.linear_scaled_lr(0.1, 0)
la.linear_scaled_lr(0.1, 8192, base_batch_size=-256)
la.Recorder(3)
la.Recorder(LARS(params, 0.1), every=0)
la.Recorder(LARS(params, 0.1)).plot()
""",
    ),
    Section(
        "`lars_torch`",
        TORCH,
        "[p.detach().clone() for p in model.parameters()], [dict(x) for x in opt.state.values()], opt.steps",
        """
LARS([], lr=0.1)
LARS(model.parameters())
LARS([torch.ones(3, dtype=torch.int64)], lr=0.1)
LARS([3.0], lr=0.1)
LARS([model.weight, model.weight], lr=0.1)
LARS(model.weight, lr=0.1)
LARS([(model.weight * 2)], lr=0.1)
new(lr=-1)
new(lr="0.1")
new(momentum=-1)
new(nesterov=True)
new(rule="flsh")
new(weight_decay=float("nan"))
new(trust_bounds=(1, 0))
new(nonfinite="ignore")
new(kernel="cuda").step()
new(kernel="fast")
new(fused=True, foreach=True)
new(differentiable=True, fused=True)
new(weight_deacy=0.1)
new(trust_coeff=0.001)
new(lars_adaptation_filter=None)
new(layer_of=3)
new(shard_group="world")
set_grad(torch.ones(2, 3).to_sparse())
set_group(lr=-1)
set_group(rule="flsh")
set_group(momentum="0.9")
set_group(lr=torch.ones(2))
opt.add_param_group({"params": [model.weight]})
opt.add_param_group({"params": [torch.ones(2)], "lr": -1})
opt.add_param_group([torch.ones(2)])
opt.load_state_dict({})
opt.load_state_dict({"state": {}, "param_groups": []})
opt.load_state_dict(saved | {"param_groups": [saved["param_groups"][0] | {"params": [0]}]})
opt.load_state_dict(saved | {"state": {0: {"momentum_buffer": torch.ones(7)}}})
opt.load_state_dict(saved | {"param_groups": [saved["param_groups"][0] | {"lr": -1}]})
opt.step(closure=3)
LARS(param_groups(model, weight_decay=-1), lr=0.1)
param_groups(model, 1e-4, no_decay="(")
param_groups(3, 1e-4)
""",
    ),
    Section(
        "`lars_jax`",
        JAX,
        "params, opt.params, opt.steps",
        """
lars(-0.1)
lars("0.1")
lars(0.1, momentum=-1)
lars(0.1, rule="flsh")
lars(0.1, nesterov=True, momentum=0)
lars(0.1, trust_bounds=(2, 1))
lars(0.1, nonfinite="ignore")
lars(0.1, weight_decay_mask=3).update(g, state, params)
lars(0.1, weight_decay_mask={"w": True}).update(g, state, params)
lars(0.1, layer_axes=3).update(g, state, params)
lars(0.1, weight_deacy=0.1)
lars(lr=0.1)
lars(0.1, trust_coeff=0.001)
LARS(params, learning_rate=0.1)
solver.init({"w": jnp.ones(3, int)})
solver.update(g, state)
solver.update({"w": g["w"]}, state, params)
solver.update(g | {"w": g["b"]}, state, params)
solver.update(g, None, params)
LARS({}, 0.1)
LARS({"w": jnp.ones(3, int)}, 0.1)
LARS(params, -0.1)
LARS(params, 0.1, rule="flsh")
LARS(params, 0.1, kernel="fast")
LARS(params, 0.1, donate="yes")
opt.step(None)
opt.step({"w": g["w"]})
opt.step(g | {"w": g["b"]})
opt.step(g | {"w": jnp.full((2, 3), jnp.nan)})
opt.step(g, found_inf="no")
opt.load_state_dict({})
opt.load_state_dict(saved | {"steps": -1})
opt.replace_params({"w": params["w"]})
opt.replace_params(params | {"w": jnp.ones(3)})
lars_jax.from_state_dict({}, params)
lars(0.1, **lars_jax.param_groups(params, -1))
lars_jax.param_groups(params, 1e-4, no_decay="(")
""",
    ),
]
