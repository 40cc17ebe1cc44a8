"""Modules against plain torch layers with the same parameters: outputs, running statistics, counts, frozen norms."""

import copy

import pytest
import torch
from torch import nn

from fastfuse.errors import InputError
from fastfuse.nn.connectors import Connector
from fastfuse.nn.fusion import FusionHead, TransFusion
from fastfuse.nn.transforms import DeepToShallow
from fastfuse.testing import relative_l2

BOUND = 1e-12


def draw(*shape):
    return torch.randn(shape, dtype=torch.float64)


def scatter(module):
    """Parameters and statistics that are not their tidy initial values."""
    for name, x in module.double().state_dict().items():
        if "norm" in name and x.is_floating_point():
            x.copy_(draw(*x.shape).abs() + 0.5)
    return module


def buffers(module):
    return {name: x.clone() for name, x in module.named_buffers()}


def plain_fusion(module, features):
    """The same layers, called one after another on a real concatenation."""
    x = module.norm1(module.depthwise(torch.cat(features, 1))).relu()
    return module.norm2(module.pointwise(x)).relu()


def plain_transform(module, x):
    maps = []
    for stage in module.stages:
        x = stage.norm(stage.deconv(x)).relu()
        maps.insert(0, x)
    return maps


def fusion():
    features = [draw(3, 2, 5, 4), draw(3, 3, 5, 4)]
    return scatter(FusionHead([2, 3], 4, 5)), features, lambda m, x: m(x).fused, plain_fusion


def transform():
    def joined(forward):
        return lambda m, x: torch.cat([y.flatten() for y in forward(m, x)])

    return scatter(DeepToShallow([2, 3, 4])), draw(3, 4, 3, 2), joined(lambda m, x: m(x)), joined(plain_transform)


each_module = pytest.mark.parametrize("make", [fusion, transform])


def norms(module):
    return [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]


def assert_like_plain_layers(make, prepare):
    """Two training forwards and an evaluation give the plain layers' results and leave the plain layers' state."""
    ours, inputs, run, plain = make()
    prepare(ours)
    theirs = copy.deepcopy(ours)
    for training in (True, True, False):
        if not training:
            ours.eval(), theirs.eval()
        assert relative_l2(run(ours, inputs), plain(theirs, inputs)) <= BOUND
        expected = buffers(theirs)
        for name, x in buffers(ours).items():
            assert relative_l2(x, expected[name]) <= BOUND, name
    return ours


@each_module
def test_running_statistics_are_those_of_batch_norm(make):
    module = assert_like_plain_layers(make, lambda module: None)
    assert [norm.num_batches_tracked.item() for norm in norms(module)] == [2, 2]


@each_module
@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_momentum_and_eps_are_the_norms_own(make, momentum):
    def prepare(module):
        for norm in norms(module):
            norm.momentum, norm.eps = momentum, 1e-2

    assert_like_plain_layers(make, prepare)


@each_module
@pytest.mark.parametrize(
    ("attribute", "message"),
    [("momentum", "momentum=None"), ("bias", "has no bias"), ("running_mean", "has no running_mean")],
)
def test_incomplete_norm_is_refused(make, attribute, message):
    module, inputs, run, _ = make()
    setattr(norms(module)[0], attribute, None)
    with pytest.raises(InputError, match=message):
        run(module, inputs)


@each_module
@pytest.mark.parametrize("frozen", [0, 1])
def test_frozen_norm_stays_frozen(make, frozen):
    module = assert_like_plain_layers(make, lambda module: norms(module)[frozen].eval())
    counts = [norm.num_batches_tracked.item() for norm in norms(module)]
    assert counts == [0 if i == frozen else 2 for i in range(2)]


@each_module
def test_evaluation_changes_no_buffer(make):
    module, inputs, run, _ = make()
    before = buffers(module.eval())
    run(module, inputs)
    assert all(torch.equal(x, before[name]) for name, x in buffers(module).items())


@each_module
def test_gradient_reaches_every_parameter(make):
    ours, inputs, run, plain = make()
    theirs = copy.deepcopy(ours)
    for module, forward in ((ours, run), (theirs, plain)):
        forward(module, inputs).square().sum().backward()
    for (name, x), y in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if name.startswith("classifier"):
            continue  # the fused map does not depend on it; see test_fusion_head_output
        assert relative_l2(x.grad, y.grad) <= 1e-10, name


@each_module
def test_compiles_in_one_graph_and_keeps_counting(make):
    torch.compiler.reset()
    ours, inputs, run, _ = make()
    theirs = copy.deepcopy(ours)
    compiled = torch.compile(lambda x: run(theirs, x), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert relative_l2(compiled(inputs), run(ours, inputs)) <= BOUND
    expected = buffers(ours)
    for name, x in buffers(theirs).items():
        assert relative_l2(x, expected[name]) <= BOUND, name


@each_module
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_module(make, dtype):
    module, inputs, run, _ = make()
    truth = run(module.eval(), inputs)
    module.to(dtype)
    rounded = [x.to(dtype) for x in inputs] if isinstance(inputs, list) else inputs.to(dtype)
    found = run(module, rounded)
    assert found.dtype == dtype
    assert relative_l2(found, truth) <= 10 * torch.finfo(dtype).eps


def test_fusion_head_output():
    head, features, _, _ = fusion()
    logits, fused, attention = head.eval()(features)
    expected = plain_fusion(head, features)
    assert relative_l2(fused, expected) <= BOUND
    assert relative_l2(attention, expected.square().mean(1)) <= BOUND
    assert relative_l2(logits, head.classifier(nn.functional.adaptive_avg_pool2d(expected, 1).flatten(1))) <= BOUND


def test_autocast_keeps_the_attention_in_float32():
    head, features, _, _ = fusion()
    truth = head.eval()(features)
    head.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = head([x.float() for x in features])
    assert found.attention.dtype == torch.float32
    for x, true in zip(found, truth, strict=True):
        assert relative_l2(x, true) <= 0.05


def test_trans_fusion_gives_the_attention_of_its_wide_map():
    module = scatter(TransFusion([3], 6)).eval()
    x = draw(2, 3, 5, 4)
    assert relative_l2(module([x]), plain_fusion(module, [x]).square().mean(1)) <= BOUND
    assert "classifier.weight" not in module.state_dict()


def test_targets_of_a_transform_leave_no_trace():
    module, deep, _, _ = transform()
    before = buffers(module.train())
    made = module(deep, training=False)
    assert all(torch.equal(x, before[name]) for name, x in buffers(module).items())
    assert module.training and all(norm.training for norm in norms(module))
    for x, y in zip(made, plain_transform(copy.deepcopy(module).eval(), deep), strict=True):
        assert relative_l2(x, y) <= BOUND


def test_first_targets_use_statistics_0_and_1():
    """As in the published program: before any training the norm is nearly the identity."""
    module, deep = DeepToShallow([3, 4]).double(), draw(2, 4, 3, 2)
    (made,) = module(deep, training=False)
    assert relative_l2(made, module.stages[0].deconv(deep).relu() / (1 + 1e-5) ** 0.5) <= BOUND


@pytest.mark.parametrize(
    ("channels", "deep", "sizes"),
    [
        pytest.param([4, 8, 16], (8, 8), None, id="residual networks: halved channels, doubled sides"),
        pytest.param([6, 11, 15], (4, 4), None, id="dense networks: channels that are no halves"),
        pytest.param([2, 3, 4], (7, 7), [(27, 28), (14, 14)], id="27 from 14 on one axis"),
        pytest.param([2, 3], (1, 1), [(2, 1)], id="a single pixel"),
    ],
)
def test_transform_gives_the_shapes_of_the_shallow_maps(channels, deep, sizes):
    made = DeepToShallow(channels)(torch.randn(2, channels[-1], *deep), sizes=sizes)
    doubled = [tuple(side * 2**j for side in deep) for j in range(len(channels) - 1, 0, -1)]
    assert [tuple(m.shape) for m in made] == [(2, c, *s) for c, s in zip(channels[:-1], sizes or doubled, strict=True)]


def test_transform_of_one_stage_is_refused():
    with pytest.raises(InputError, match="at least two stages, not \\[16\\]"):
        DeepToShallow([16])


def test_one_value_per_channel_is_refused_in_training_as_by_batch_norm():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        FusionHead([2], 2, 3)([torch.ones(1, 2, 1, 1)])


def test_initialisation_is_the_published_one():
    """N(0, sqrt(2 / (kh kw C_out))) for the fusion's convolutions, norms at 1 and 0, torch's default elsewhere."""
    head = FusionHead([256, 256], 256, 10)
    for weight, std in ((head.depthwise.weight, (2 / (9 * 512)) ** 0.5), (head.pointwise.weight, (2 / 256) ** 0.5)):
        assert weight.std().item() == pytest.approx(std, rel=0.05)
        assert abs(weight.mean().item()) < 0.05 * std
    for norm in norms(head):
        assert (norm.weight == 1).all() and (norm.bias == 0).all()


def test_connector():
    connector, x = Connector(3, 64).double(), draw(2, 3, 5, 4)
    assert sorted(dict(connector.named_parameters())) == ["conv.weight", "norm.bias", "norm.weight"]
    found = connector(x)
    mixed = torch.einsum("oc,bchw->bohw", connector.conv.weight[:, :, 0, 0], x)
    centred = mixed - mixed.mean((0, 2, 3), keepdim=True)
    expected = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
    assert relative_l2(found, expected) <= BOUND
    assert Connector(64, 64).conv.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.05)


def test_a_synchronised_norm_is_refused_rather_than_silently_local():
    head = torch.nn.SyncBatchNorm.convert_sync_batchnorm(FusionHead([4, 4], 4, 3))
    with pytest.raises(InputError, match="SyncBatchNorm"):
        head([torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)])
