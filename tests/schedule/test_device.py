from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from attncc.errors import AttnccError, UnsupportedError
from attncc.schedule import device as device_module
from attncc.schedule.device import (
    INTERPRETER,
    device_for,
    device_names,
    device_of,
    load_device,
    parse_device,
    targets,
)

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
