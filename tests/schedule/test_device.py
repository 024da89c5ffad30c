from __future__ import annotations

import re
import shutil
from types import SimpleNamespace

import pytest
import torch

from attncc.errors import AttnccError, UnsupportedError
from attncc.schedule import device as device_module
from attncc.schedule.choose import facts_of, schedule_key
from attncc.schedule.device import (
    INTERPRETER,
    device_for,
    device_names,
    device_of,
    load_device,
    parse_device,
    targets,
)

from .problems import problem

NAMED = ("a100", "b200", "h100", "h200", "l4", "mi300x", "rtx3090", "rtx4090", "rtx5090")


@pytest.fixture
def card(monkeypatch):
    """Pretends that the machine's one GPU is of this name and size."""

    def pretend(name, major, minor, sms, smem=101376, hip=None, arch=""):
        properties = SimpleNamespace(
            name=name,
            major=major,
            minor=minor,
            multi_processor_count=sms,
            shared_memory_per_block=49152,
            shared_memory_per_block_optin=smem,
            shared_memory_per_multiprocessor=smem + 1024,
            gcnArchName=arch,
        )
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.version, "hip", hip)
        device_module._device_of_index.cache_clear()
        return device_of("cuda")

    yield pretend
    device_module._device_of_index.cache_clear()


def test_the_shipped_devices():
    assert device_names() == NAMED
    assert targets() == ("sm_80", "sm_86", "sm_89", "sm_90", "gfx942", "sm_100", "sm_120")


@pytest.mark.parametrize("name", NAMED)
def test_figures_agree_with_each_other(name):
    device = load_device(name)
    assert device.smem_per_block <= device.smem_per_sm
    assert device.regs_per_sm >= 65536
    # The published float32 rate is that of the FMA units, where no matmul instruction has one of its own.
    units = 2 * device.fma_per_clk_sm * device.sms * device.clock_ghz / 1e3
    assert device.tensor_tflops["fp32"] == pytest.approx(units, rel=0.02)
    assert device.tensor_tflops["bf16"] == device.tensor_tflops["fp16"]
    # A matmul unit does a power of two of operations a clock.
    per_clock = device.tensor_tflops["bf16"] * 1e3 / device.clock_ghz / device.sms
    assert min(abs(per_clock / 2**n - 1) for n in range(8, 15)) < 0.03


def test_every_architecture_has_one_reference_card():
    for target in targets():
        cards = [name for name in device_names() if load_device(name).target == target and load_device(name).reference]
        assert len(cards) == 1


def test_names_and_architectures():
    assert device_for("h200").name == device_for("H200").name == "h200"
    assert device_for("sm_90").name == "h100"
    assert device_for("sm_89").name == "rtx4090"
    assert device_for("gfx942").name == "mi300x"
    assert device_for("cpu") is INTERPRETER


@pytest.mark.parametrize("name", ["sm_75", "v100", "", "../h100"])
def test_an_unknown_target_names_the_known_ones(name):
    with pytest.raises(UnsupportedError, match=r"a100, b200.*sm_80, sm_86.*\n.*schedules/devices/"):
        device_for(name)


def test_a_cpu_is_the_interpreter():
    assert device_of("cpu") is INTERPRETER
    assert device_of(torch.device("cpu")) is INTERPRETER


def test_other_device_types_are_refused():
    with pytest.raises(UnsupportedError, match=r"'meta' is neither"):
        device_of("meta")


def test_a_listed_card_by_its_name(card):
    found = card("NVIDIA H100 80GB HBM3", 9, 0, sms=132, smem=232448)
    assert (found.name, found.title, found.dram_gbps) == ("h100", "NVIDIA H100 80GB HBM3", 3352)
    assert card("NVIDIA H200", 9, 0, sms=132, smem=232448).name == "h200"
    assert card("NVIDIA L4", 8, 9, sms=58).name == "l4"


def test_a_smaller_card_of_the_same_name_is_scaled(card):
    found = card("NVIDIA H100 PCIe", 9, 0, sms=114, smem=232448)
    assert (found.sms, found.name) == (114, "h100")
    assert found.tensor_tflops["bf16"] == pytest.approx(989 * 114 / 132)


def test_an_unlisted_card_is_its_architectures_reference_at_its_own_size(card):
    found = card("NVIDIA L40S", 8, 9, sms=142)
    assert (found.name, found.title, found.sms) == ("rtx4090", "NVIDIA L40S", 142)
    assert found.tensor_tflops["bf16"] == pytest.approx(165.2 * 142 / 128)


def test_what_an_unlisted_card_measures_is_not_kept_as_the_reference_cards(card):
    """An L40 has as many SMs as an L40S, and neither is an RTX 4090."""
    l40s = card("NVIDIA L40S", 8, 9, sms=142)
    l40, listed = card("NVIDIA L40", 8, 9, sms=142), card("NVIDIA GeForce RTX 4090", 8, 9, sms=128)
    assert (l40s.borrowed, listed.borrowed) == (True, False)
    assert [facts_of(problem(), each)["device"] for each in (l40s, listed)] == ["NVIDIA L40S", "rtx4090"]
    assert schedule_key(problem(), l40s) != schedule_key(problem(), l40)
    assert schedule_key(problem(), listed) == schedule_key(problem(), load_device("rtx4090"))


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """The shipped device files beside others, each of which is an H100's with some lines changed."""
    source = device_module.resources.path("schedules") / "devices"
    shutil.copytree(source, tmp_path / "devices")

    def add(name, **lines):
        text = (source / "h100.toml").read_text()
        for key, value in lines.items():
            text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        (tmp_path / "devices" / f"{name}.toml").write_text(text)

    monkeypatch.setattr(device_module.resources, "path", lambda name: tmp_path)
    load_device.cache_clear()
    yield add
    load_device.cache_clear()


def test_the_file_that_names_most_of_a_card_describes_it(shelf, card):
    shelf("h100_pcie", cards='["H100 PCIe"]', reference="false", dram_gbps="2039")
    assert card("NVIDIA H100 PCIe", 9, 0, sms=114, smem=232448).dram_gbps == 2039
    assert card("NVIDIA H100 80GB HBM3", 9, 0, sms=132, smem=232448).name == "h100"


def test_a_copy_that_still_claims_what_the_other_has_is_named(shelf, card):
    shelf("gh200")
    with pytest.raises(AttnccError, match=r"gh200.toml and .*h100.toml all list the card 'NVIDIA H100 80GB"):
        card("NVIDIA H100 80GB HBM3", 9, 0, sms=132, smem=232448)
    with pytest.raises(AttnccError, match=r"gh200.toml and .*h100.toml are all of sm_90"):
        device_for("sm_90")
    assert device_for("gh200").name == "gh200"


def test_the_only_card_of_an_architecture_stands_for_it_and_names_may_have_capitals(shelf):
    shelf("GB300", target='"sm_103"', reference="false", cards='["GB300"]')
    assert device_for("sm_103").name == device_for("gb300").name == "GB300"


def test_an_amd_card_is_known_by_its_architecture(card):
    found = card("AMD Instinct MI300X", 9, 4, sms=304, smem=65536, hip="6.4", arch="gfx942:sramecc+:xnack-")
    assert (found.name, found.backend) == ("mi300x", "hip")


def test_an_unknown_architecture_is_unsupported(card):
    with pytest.raises(UnsupportedError, match=r"Tesla V100 \(sm_70\)"):
        card("Tesla V100", 7, 0, sms=80)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sms = 132", "", "missing field 'sms'"),
        ("sms = 132", "sms = 132\nspeed = 9", "unknown field 'speed'"),
        ("sms = 132", "sms = 0", "'sms' is 0, expected a positive number"),
        ("sms = 132", 'sms = "many"', "'sms' is 'many'"),
        ("tf32 = 494", "", "tensor_tflops has exactly"),
        ("sms = 132", "sms = = 1", "not a TOML file"),
        ("sms = 132", "sms = 132.5", "'sms' is 132.5, expected a positive number without a fraction"),
        ('target = "sm_90"', "target = 9.0", "'target' is 9.0, expected a text"),
        ('target = "sm_90"', 'target = "sm90"', "'target' is 'sm90', expected a name such as 'sm_86'"),
        ('backend = "cuda"', 'backend = "rocm"', "'backend' is 'rocm', expected 'cuda' or 'hip'"),
        ('backend = "cuda"', 'backend = "hip"', "'target' is 'sm_90', expected a name such as 'gfx942'"),
        ("warp_size = 32", "warp_size = 64", "'warp_size' is 64, expected 32"),
        ('cards = ["H100"]', 'cards = "H100"', "'cards' is 'H100', expected a list of parts of names"),
        ("reference = true", 'reference = "no"', "'reference' is 'no', expected true or false"),
        ("tma = true", "tma = 1", "'tma' is 1, expected true or false"),
        ('target = "sm_90"', 'target = "sm_86"', "'tma' is true, and sm_86 has no tensor memory accelerator"),
        ("tma = true", "tmem_columns = 512", "'tmem_columns' is 512, and sm_90 has no tensor memory"),
        ("bf16 = 989", "bf16 = 0", "tensor_tflops.bf16 is 0, expected a positive number"),
        ("fp32 = 61.8", 'fp32 = "61.8"', "tensor_tflops.fp32 is '61.8'"),
        ("dram_share = 0.92", "dram_share = 92", "'dram_share' is 92, expected 0.1 to 1 as a share of 1"),
        ("dram_gbps = 3352", "dram_gbps = 3.352", "'dram_gbps' is 3.352, expected 10 to 100,000 GB/s"),
        ("dram_gbps = 3352", "dram_gbps = nan", "'dram_gbps' is nan, expected a positive number"),
        ("clock_ghz = 1.83", "clock_ghz = 1830", "'clock_ghz' is 1830, expected 0.2 to 10 GHz"),
        (
            "sms = 132",
            "sms = 13",
            r"fp32 is 61.8, but 13 SMs with 128 operations a clock at 1.83 GHz have 6.09 TFLOP/s",
        ),
        ("smem_per_block = 232448", "smem_per_block = 227", "'smem_per_block' is 227, expected 16,384 to .* bytes"),
        (
            "smem_per_sm = 233472",
            "smem_per_sm = 102400",
            "'smem_per_block' is 232,448, more than 'smem_per_sm', 102,400",
        ),
    ],
)
def test_a_malformed_device_file_is_named(tmp_path, old, new, message):
    text = (device_module.resources.path("schedules") / "devices" / "h100.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new))
    with pytest.raises(AttnccError, match=rf"mine\.toml: .*{message}"):
        parse_device(path)


def test_a_new_gpu_is_a_file(tmp_path):
    text = (device_module.resources.path("schedules") / "devices" / "h100.toml").read_text()
    (tmp_path / "h20.toml").write_text(text.replace("sms = 132", "sms = 78"))
    device = parse_device(tmp_path / "h20.toml")
    assert (device.name, device.sms) == ("h20", 78)
    assert device.matmul_tflops("fp32", "tf32") == 494
    assert device.matmul_tflops("fp32", "ieee") == 61.8
    assert device.matmul_tflops("fp16", "ieee") == 989
    assert hash(device) != hash(load_device("h100"))
