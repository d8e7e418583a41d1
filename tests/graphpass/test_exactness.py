"""Exact means what Inductor alone gives, bit for bit: outputs, gradients, buffers, random numbers.

Every test does the same thing twice from the same seed, with `backend="inductor"` and with
`backend="approx"` in a setting that promises exactness, and compares all that can be seen of it.

Most run the graphs that Inductor is given as they are, from both backends: the same graphs with the
same inputs become the same code. One net is trained with the code that Inductor generates; with
`pytest --inductor` all are.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import graphpass
from tests.graphpass.nets import NETS, Batch, Net

Results = dict[str, Tensor]
Forward = Callable[[nn.Module, Batch], Tensor]
# Trains a compiled model, and returns all that can be seen of it.
Training = Callable[[nn.Module, Net], Results]

# What the user asks for in each setting that promises exactness.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "budget_0": {"budget": 0},
    "nothing_pays": {},
    "never_selected": {"methods": {"*": "zero"}, "warmup_steps": 1000},
    "exact_section": {"methods": {"*": "zero"}},
}
# In these the plan says that every weight gradient is zero, and must not be followed.
PLANNED = ("never_selected", "exact_section")

STEPS = 3
SAMPLES = 4
SEED = 5

pytestmark = [
    # Raised, not shown, where warnings are errors: Dynamo looks for gradients on what one piece of
    # a broken graph hands to the next (2.13, torch/_dynamo/variables/builder.py, safe_has_grad).
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
]


def _on_one_worker(pairs: list[tuple[str, str]]) -> list[Any]:
    """Train each net with Inductor once, not once on every worker."""
    return [pytest.param(*pair, marks=pytest.mark.xdist_group(pair[0])) for pair in pairs]


# Each net in one setting at least, each setting with nets of several kinds.
@pytest.mark.parametrize(
    ("name", "setting"),
    _on_one_worker(
        [
            ("cnn2", "budget_0"),
            ("conv_only", "nothing_pays"),
            ("resnet8", "never_selected"),
            ("vgg", "budget_0"),
            ("unet", "never_selected"),
            ("separable", "exact_section"),
            *(("mlp", setting) for setting in SETTINGS),
            ("lstm", "exact_section"),
            ("transformer", "never_selected"),
            ("transformer_dropout", "nothing_pays"),
            ("transformer_dropout", "exact_section"),
            ("tied", "exact_section"),
            ("graph_break", "exact_section"),
            ("checkpointed", "never_selected"),
            ("frozen", "never_selected"),
        ]
    ),
)
@pytest.mark.usefixtures("interpreted")
def test_training(name: str, setting: str) -> None:
    assert_identical(run(NETS[name], train, setting), trained_by_inductor(name))


def test_training_with_generated_code() -> None:
    """What the other tests leave out: loops that Inductor fuses, and its own random numbers."""
    net = NETS["noisy"]
    expected = run(net, train)
    for setting in ("nothing_pays", "never_selected"):
        assert_identical(run(net, train, setting), expected)


@pytest.mark.usefixtures("interpreted")
def test_the_comparison_sees_an_approximation() -> None:
    """The plan of the settings above, followed, gives other results."""
    net = NETS["conv_only"]
    followed = run(net, train, options={"methods": {"*": "zero"}})
    assert not identical(followed, run(net, train))


def in_bf16(model: nn.Module, batch: Batch) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        result: Tensor = model(*batch)
    assert result.dtype == torch.bfloat16
    return result


def channels_last(model: nn.Module, net: Net) -> Results:
    model.to(memory_format=torch.channels_last)

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        result: Tensor = model(*(x.to(memory_format=torch.channels_last) for x in batch))
        return result

    return train(model, net, forward)


def accumulated(model: nn.Module, net: Net) -> Results:
    """Train on two batches a step, with a backward pass each."""
    return train(model, net, sizes=[(4, 4)] * STEPS)


def two_forwards(model: nn.Module, net: Net) -> Results:
    """Train on two batches a step, both forward passes before the one backward pass."""

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        first, second = (model(*half) for half in zip(*(x.chunk(2) for x in batch), strict=True))
        return torch.cat([first, second])

    return train(model, net, forward)


def checkpointed_from_outside(model: nn.Module, net: Net, reentrant: bool = False) -> Results:
    """Train the model as a block that is computed again in backward, behind a layer in eager mode.

    Its input needs a gradient.
    """
    (x,) = net.batch(1)
    stem = nn.Conv2d(x.shape[1], x.shape[1], 1)

    def forward(model: nn.Module, batch: Batch) -> Tensor:
        result: Tensor = checkpoint(model, stem(*batch), use_reentrant=reentrant)
        return result

    return train(model, net, forward) | gradients(stem, "stem")


@pytest.mark.parametrize(
    ("training", "name"),
    [
        pytest.param(lambda model, net: train(model, net, in_bf16), "noisy", id="autocast"),
        pytest.param(channels_last, "separable", id="channels_last"),
        pytest.param(accumulated, "conv_only", id="accumulation"),
        pytest.param(two_forwards, "conv_only", id="two_forwards"),
        pytest.param(checkpointed_from_outside, "conv_only", id="checkpoint_around"),
        pytest.param(
            partial(checkpointed_from_outside, reentrant=True),
            "conv_only",
            id="reentrant_checkpoint",
        ),
    ],
)
@pytest.mark.usefixtures("interpreted")
def test_ways_to_train(training: Training, name: str) -> None:
    expected = run(NETS[name], training)
    for setting in ("budget_0", "exact_section"):
        assert_identical(run(NETS[name], training, setting), expected)


@pytest.mark.parametrize("name", ["mlp", "noisy"])
@pytest.mark.usefixtures("interpreted")
def test_dynamic_batch(name: str) -> None:
    """The batch is a symbol in the graph, and no size compiles it again."""

    def training(model: nn.Module, net: Net) -> Results:
        # Sizes that no other dimension has, or Dynamo takes two symbols for one.
        results = train(model, net, sizes=[(10,), (7,), (12,)])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        return results

    expected = run(NETS[name], training, dynamic=True)
    for setting in ("budget_0", *PLANNED):
        assert_identical(run(NETS[name], training, setting, dynamic=True), expected)


def outputs(model: nn.Module, net: Net) -> Results:
    """Return what the model computes where nothing is trained, and the state it is left in."""
    results = {}
    for training in (False, True):
        model.train(training)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                results[f"{mode.__name__}, training={training}"] = model(*net.batch(SAMPLES))
    model.eval()
    results["grad mode"] = model(*net.batch(SAMPLES)).detach()
    return results | state(model)


@pytest.mark.parametrize("name", ["separable", "noisy"])
@pytest.mark.usefixtures("interpreted")
def test_outputs_after_approximate_training(name: str) -> None:
    """Evaluation of a model that was trained with zeros is Inductor's, with the same weights."""
    weights: list[Mapping[str, Tensor]] = []

    def train_and_evaluate(model: nn.Module, net: Net) -> Results:
        train(model, net)
        weights.append(clone(model.state_dict()))
        torch.manual_seed(SEED)
        return outputs(model, net)

    def load_and_evaluate(model: nn.Module, net: Net) -> Results:
        model.load_state_dict(weights[0])
        torch.manual_seed(SEED)
        return outputs(model, net)

    net = NETS[name]
    got = run(net, train_and_evaluate, options={"methods": {"*": "zero"}})
    assert_identical(got, run(net, load_and_evaluate))


def saliency(model: nn.Module, net: Net) -> Results:
    """Return every gradient of the model in evaluation mode, that of its input among them."""
    model.eval()
    model.zero_grad()
    (x,) = net.batch(SAMPLES)
    x.requires_grad_()
    loss_of(model(x)).backward()
    assert x.grad is not None
    return gradients(model, "eval") | {"input": x.grad}


@pytest.mark.parametrize("gradient", ["weight", "input"])
@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.usefixtures("interpreted")
def test_gradients_in_evaluation_mode(before: int, gradient: str) -> None:
    """They are exact, although the graph of this net is the one that training uses.

    Args:
        before: number of training steps taken before.
        gradient: what the plan says is zero.
    """
    net = NETS["conv_only"]
    weights: list[Mapping[str, Tensor]] = []

    def train_and_look(model: nn.Module, net: Net) -> Results:
        train(model, net, sizes=[(SAMPLES,)] * before)
        weights.append(clone(model.state_dict()))
        torch.manual_seed(SEED)
        return saliency(model, net)

    def load_and_look(model: nn.Module, net: Net) -> Results:
        model.load_state_dict(weights[0])
        torch.manual_seed(SEED)
        return saliency(model, net)

    options = {"methods": {"conv*": {"name": "zero", "gradient": gradient}}}
    assert_identical(run(net, train_and_look, options=options), run(net, load_and_look))


@pytest.mark.usefixtures("interpreted")
def test_exact_section_of_a_model_of_a_class_seen_before() -> None:
    """A model has a session of its own, also where Dynamo has compiled its class already."""
    net = NETS["conv_only"]
    options = {"methods": {"*": "zero"}}
    expected = run(net, train)
    run(net, train, options=options)
    assert_identical(run(net, train, "exact_section", fresh=False), expected)


@pytest.mark.usefixtures("interpreted")
def test_checkpoint_around_two_forwards_of_different_variants() -> None:
    """What is computed again in backward is what was computed forward, not what came last."""

    def training(model: nn.Module, net: Net) -> Results:
        def forward(model: nn.Module, batch: Batch) -> Tensor:
            halves = [checkpoint(model, x, use_reentrant=False) for x in batch[0].chunk(2)]
            return torch.cat(halves)

        return train(model, net, forward, sizes=[(SAMPLES,)])

    # The second forward pass of every backward pass is approximated.
    alternating = graphpass.Schedule("second", every_step=2, phase=1)
    net = NETS["conv_only"]
    got = run(net, training, options={"methods": {"*": "zero"}, "schedule": alternating})
    assert torch.equal(got["output 0.0"], run(net, training)["output 0.0"])


# What is compared, and how.


def run(
    net: Net,
    training: Training,
    setting: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    fresh: bool = True,
) -> Results:
    """Compile a net and train it, from the same seed every time.

    Args:
        net: the net.
        training: what to do with it.
        setting: name of a setting that promises exactness; None for `options`.
        options: options of the backend; None, without a setting, for Inductor.
        dynamic: as `torch.compile` takes it.
        fresh: whether to forget what was compiled before.
    """
    if fresh:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
    torch.manual_seed(SEED)
    model = net.build()
    if setting is not None:
        options = SETTINGS[setting]
    if options is None:
        compiled = torch.compile(model, backend="inductor", dynamic=dynamic)
    else:
        given = {"strict": True, **options}
        compiled = torch.compile(model, backend="approx", options=given, dynamic=dynamic)
    scope: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if setting == "exact_section":
        scope = graphpass.session(compiled).exact()
    with scope:
        results = training(compiled, net)
    if setting in PLANNED:
        assert graphpass.session(compiled).plan.approximated
    # However random numbers were drawn, the next ones are the same.
    return results | {"generator": torch.get_rng_state()}


@lru_cache(maxsize=1)
def trained_by_inductor(name: str) -> Results:
    """Return what the nets of `test_training`, which come in groups, are compared with."""
    return run(NETS[name], train)


def train(
    model: nn.Module,
    net: Net,
    forward: Forward = lambda model, batch: model(*batch),
    sizes: Sequence[Sequence[int]] = [(SAMPLES,)] * STEPS,
) -> Results:
    """Train with momentum, and return every output and gradient, and the state at the end.

    Args:
        model: compiled model.
        net: where its batches come from.
        forward: computes the outputs of one batch.
        sizes: for every step, the sizes of its batches.
    """
    results: Results = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step, counts in enumerate(sizes):
        optimizer.zero_grad()
        for part, count in enumerate(counts):
            output = forward(model, net.batch(count))
            loss_of(output).backward()
            results[f"output {step}.{part}"] = output.detach().clone()
        results |= gradients(model, f"step {step}")
        optimizer.step()
    return results | state(model)


def loss_of(output: Tensor) -> Tensor:
    return output.float().square().mean()


def gradients(model: nn.Module, when: str) -> Results:
    named = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {f"{when}, {name}": grad.clone() for name, grad in named.items() if grad is not None}


def state(model: nn.Module) -> Results:
    return {f"at the end, {name}": value for name, value in clone(model.state_dict()).items()}


def clone(tensors: Mapping[str, Tensor]) -> Results:
    return {name: value.detach().clone() for name, value in tensors.items()}


def assert_identical(got: Results, expected: Results) -> None:
    assert got.keys() == expected.keys()
    different = [name for name in expected if not identical_tensors(got[name], expected[name])]
    assert not different


def identical(got: Results, expected: Results) -> bool:
    return all(identical_tensors(got[name], expected[name]) for name in expected)


def identical_tensors(got: Tensor, expected: Tensor) -> bool:
    """Compare values, dtype and layout; NaN is equal to nothing."""
    return (
        got.dtype == expected.dtype
        and got.shape == expected.shape
        and steps(got) == steps(expected)
        and torch.equal(got, expected)
    )


def steps(tensor: Tensor) -> list[int]:
    """Return the strides; where the size is 1 they mean nothing, and count as 0."""
    return [
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
