import dataclasses

import numpy as np
import pytest

from gnetlab.net.architecture import (
    HEAD_AFTER,
    MODULES,
    PRESETS,
    TABLE_1,
    Architecture,
    Widths,
    architecture,
)

FIELDS = [field.name for field in dataclasses.fields(Architecture)]
# Input and output channels of every Inception module, from the paper's text and Table 1.
CHANNELS = {
    "3a": (192, 256), "3b": (256, 480),
    "4a": (480, 512), "4b": (512, 512), "4c": (512, 512), "4d": (512, 528), "4e": (528, 832),
    "5a": (832, 832), "5b": (832, 1024),
}  # fmt: skip
ROWS = {row.stage: row for row in TABLE_1}


def test_table_1_has_22_layers_and_the_nine_modules_in_order():
    assert sum(row.depth for row in TABLE_1) == 22
    assert list(MODULES) == list(CHANNELS)
    assert all(row.widths is None for row in TABLE_1 if row.stage not in CHANNELS)


@pytest.mark.parametrize("stage", CHANNELS)
def test_table_1_widths_add_up_to_the_output_size_column(stage):
    widths = MODULES[stage]
    outputs = widths.conv1x1 + widths.conv3x3 + widths.conv5x5 + widths.pool_proj
    assert outputs == CHANNELS[stage][1]


def inception_macs(stage):
    row, inputs = ROWS[stage], CHANNELS[stage][0]
    ones = row.widths.conv1x1 + row.widths.reduce3x3 + row.widths.reduce5x5 + row.widths.pool_proj
    weights = (
        inputs * ones
        + 9 * row.widths.reduce3x3 * row.widths.conv3x3
        + 25 * row.widths.reduce5x5 * row.widths.conv5x5
    )
    return weights * row.size**2


MACS = {stage: inception_macs(stage) for stage in CHANNELS if stage != "5a"}  # 5a prints 54, is 51
MACS["conv1"] = (3 * 8 * 49 + 24 * 64) * 112**2  # the separable stem, which the paper's 2.7K fits
MACS["conv2"] = (64 * 64 + 64 * 192 * 9) * 56**2
MACS["linear"] = 1024 * 1000


@pytest.mark.parametrize("stage", MACS)
def test_table_1_operations_follow_from_its_widths_and_sizes(stage):
    assert MACS[stage] / 1e6 == pytest.approx(ROWS[stage].printed_ops, abs=1)


@pytest.mark.parametrize("stage", ["conv1", "conv2", "3a", "linear"])
def test_table_1_parameters_follow_from_its_widths(stage):
    weights = MACS[stage] // ROWS[stage].size ** 2
    assert weights / 1024 == pytest.approx(ROWS[stage].printed_params, rel=0.02)


@pytest.mark.parametrize(
    ("field", "nearest"), [("steem", "stem"), ("nrom", "norm"), ("widht", "width")]
)
@pytest.mark.parametrize("make", [architecture, PRESETS["paper"].change])
def test_unknown_field_names_the_nearest_and_all_known(make, field, nearest):
    with pytest.raises(ValueError, match=f"{field!r}.*Did you mean {nearest!r}") as caught:
        make(**{field: 1})
    assert all(known in str(caught.value) for known in FIELDS)


@pytest.mark.parametrize(
    ("preset", "hint"),
    [
        ("torchvison", "Did you mean 'torchvision'"),
        ("papr", "Did you mean 'paper'"),
        ("cifar10", "Did you mean 'cifar'"),
        ("zzzz", "'zzzz'. Known:"),
    ],
)
def test_unknown_preset_names_the_nearest_and_all_known(preset, hint):
    with pytest.raises(ValueError, match="unknown preset") as caught:
        architecture(preset)
    assert hint in str(caught.value)
    assert all(known in str(caught.value) for known in PRESETS)


@pytest.mark.parametrize(
    ("field", "value", "choices"),
    [
        ("norm", "instance", "'batch', 'lrn', None"),
        ("stem", "vgg", "'paper', 'separable', 'cifar', 'compact'"),
        ("branch5x5", "7x7", "'5x5', '3x3', '3x3+3x3'"),
        ("head_pool", "max", "'5x5/3', 'adaptive'"),
        ("pool4_size", 4, "2, 3"),
        ("heads", ("aux1", "aux3"), "'aux1', 'aux2'"),
        ("reduce", "no", "True, False"),
        ("conv_bias", None, "True, False"),
    ],
)
def test_bad_choice_says_what_was_asked_and_what_there_is(field, value, choices):
    asked = value[1] if field == "heads" else value
    with pytest.raises(ValueError, match="choose one of") as caught:
        PRESETS["paper"].change(**{field: value})
    assert repr(asked) in str(caught.value)
    assert choices in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("in_channels", 0),
        ("in_channels", 2.5),
        ("num_classes", 0),
        ("num_classes", "10"),
        ("width", 0),
        ("width", -1.0),
        ("width", 17),
        ("width", float("nan")),
        ("extra_modules", -1),
        ("extra_modules", 1.0),
        ("batch_norm_eps", -1e-3),
        ("batch_norm_eps", float("nan")),
    ],
)
def test_number_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field} = {value!r} asked"):
        PRESETS["paper"].change(**{field: value})


def test_head_asked_twice_is_refused():
    with pytest.raises(ValueError, match="aux1"):
        PRESETS["paper"].change(heads=("aux1", "aux1"))


def test_transform_input_needs_rgb():
    with pytest.raises(ValueError, match="in_channels = 1"):
        PRESETS["torchvision"].change(in_channels=1, transform_input=True)


@pytest.mark.parametrize(
    ("preset", "changes", "bias"),
    [
        ("paper", {"norm": "batch"}, False),
        ("paper", {"norm": "batch", "conv_bias": True}, True),
        ("paper", {"norm": None}, True),
        ("torchvision", {"norm": None}, True),
        ("torchvision", {"norm": "lrn"}, True),
        ("torchvision", {"norm": "lrn", "conv_bias": False}, False),
        ("torchvision", {"width": 0.5}, False),
    ],
)
def test_batch_norm_takes_the_place_of_biases(preset, changes, bias):
    assert PRESETS[preset].change(**changes).conv_bias is bias


@pytest.mark.parametrize("stem", ["cifar", "compact"])
def test_small_image_stems_pool_their_heads_adaptively_unless_told(stem):
    assert architecture("paper", stem=stem).head_pool == "adaptive"
    assert architecture("paper", stem=stem, head_pool="5x5/3").head_pool == "5x5/3"


def test_change_leaves_the_preset_as_it_was():
    before = dataclasses.asdict(PRESETS["paper"])
    changed = PRESETS["paper"].change(norm="batch", stem="compact", heads=())
    assert (changed.norm, changed.stem, changed.heads) == ("batch", "compact", ())
    assert dataclasses.asdict(PRESETS["paper"]) == before


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_frozen_and_know_their_names(preset):
    assert PRESETS[preset].name == preset
    assert architecture(preset) == PRESETS[preset]
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS[preset].width = 2.0


def test_an_architecture_can_stand_for_a_preset():
    small = PRESETS["cifar"].change(width=0.25)
    assert architecture(small, num_classes=7) == small.change(num_classes=7)


def test_whole_numbers_may_be_numpys():
    arch = Architecture(num_classes=np.int64(3), extra_modules=np.uint8(2))
    assert arch == Architecture(num_classes=3, extra_modules=2)
    assert type(arch.num_classes) is type(arch.extra_modules) is int


def test_width_scales_channels_but_keeps_four():
    arch = Architecture(width=0.25)
    assert [arch.channels(count) for count in (64, 192, 1024)] == [16, 48, 256]
    assert arch.module_widths("3a") == Widths(16, 24, 32, 4, 8, 8)
    assert Architecture().module_widths("5b") == ROWS["5b"].widths
    narrow = Architecture(width=0.001)
    assert {narrow.channels(count) for count in range(1, 1025)} == {4}


def test_heads_stand_where_section_5_puts_them():
    assert HEAD_AFTER == {"aux1": "4a", "aux2": "4d"}


def test_heads_by_a_single_name_are_told_from_a_tuple_of_letters():
    with pytest.raises(
        ValueError, match=r"heads = 'aux1' asked; give a tuple of names, \('aux1',\)"
    ):
        architecture("paper", heads="aux1")


def test_a_list_of_heads_is_the_same_architecture():
    assert architecture("paper", heads=["aux1", "aux2"]) == PRESETS["paper"]
    assert hash(architecture("paper", heads=["aux2"]))


def test_an_unknown_preset_has_a_nearest():
    with pytest.raises(KeyError, match=r"unknown preset 'papper'. Did you mean 'paper'"):
        PRESETS["papper"]
    assert "papper" not in PRESETS
    with pytest.raises(ValueError, match=r"unknown preset \['paper'\]"):
        architecture(["paper"])
