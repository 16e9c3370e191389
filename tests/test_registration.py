"""Importing the package makes PEFT know STAR, once and for all, in any order of imports."""

from __future__ import annotations

import copy
import enum
import importlib
import pickle
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import peft.utils.peft_types
import pytest
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_star
from peft_star import StarConfig
from peft_star import registration as registration_module
from peft_star.tuner import StarModel


def run_python(code: str) -> str:
    """Run `code` in a fresh interpreter, as the registration cannot be undone in this one."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_enum_member_is_a_true_one():
    member = PeftType.STAR
    assert isinstance(member, PeftType) and isinstance(member, str)
    assert member.name == member.value == member == "STAR"
    assert str(member) == str(PeftType.LORA).replace("LORA", "STAR")
    assert repr(member) == "<PeftType.STAR: 'STAR'>"
    assert f"{member}" == f"{PeftType.LORA}".replace("LORA", "STAR")
    assert PeftType("STAR") is member and PeftType["STAR"] is member
    assert list(PeftType)[-1] is member and list(PeftType).count(member) == 1
    assert "STAR" in list(PeftType) and member in PeftType and "STAR" in PeftType.__members__
    assert {"STAR": 1}[member] == {member: 1}["STAR"] == 1
    assert hash(member) == hash("STAR")


def test_enum_member_survives_copy_and_pickle():
    assert copy.deepcopy(PeftType.STAR) is PeftType.STAR
    assert pickle.loads(pickle.dumps(PeftType.STAR)) is PeftType.STAR


def test_other_members_are_unchanged():
    assert PeftType.LORA.value == "LORA" and PeftType("LORA") is PeftType.LORA
    with pytest.raises(ValueError):
        PeftType("NO_SUCH_METHOD")


@pytest.mark.parametrize("key", [PeftType.STAR, "STAR"])
def test_mappings(key):
    assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is StarConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[key] is StarModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == "star_"


def test_registering_again_is_harmless():
    before = list(PeftType)
    registration_module.register()
    importlib.reload(peft_star)
    assert list(PeftType) == before
    assert PEFT_TYPE_TO_CONFIG_MAPPING["STAR"] is StarConfig


def test_fresh_process():
    """All of what only a fresh interpreter shows, in one, as starting it takes seconds."""
    out = run_python("""
        import sys, tempfile
        import peft.tuners.tuners_utils as tuners_utils

        # a base class moved within PEFT: the import fails with a clear message ...
        moved = tuners_utils.BaseTunerLayer
        del tuners_utils.BaseTunerLayer
        try:
            import peft_star
        except ImportError as exc:
            print(exc)
        # ... and goes through once PEFT is all right
        tuners_utils.BaseTunerLayer = moved

        import peft_star
        from peft import PeftConfig, PeftType
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
        with tempfile.TemporaryDirectory() as folder:
            peft_star.StarConfig(num_neurons=3, target_modules=["b", "a"]).save_pretrained(folder)
            loaded = PeftConfig.from_pretrained(folder)
        assert type(loaded) is peft_star.StarConfig and loaded.peft_type is PeftType.STAR
        print(loaded.num_neurons, sorted(loaded.target_modules))

        # modules that were forgotten and imported again, as some notebooks do
        first = peft_star.StarConfig
        for name in [name for name in sys.modules if name.split(".")[0] == "peft_star"]:
            del sys.modules[name]
        import peft_star
        assert peft_star.StarConfig is not first
        assert PEFT_TYPE_TO_CONFIG_MAPPING["STAR"] is peft_star.StarConfig
        assert list(PeftType).count("STAR") == 1
    """)
    message, loaded = out.strip().splitlines()
    check_message(message)
    assert loaded == "3 ['a', 'b']"


def check_message(message: str) -> None:
    assert len(message.splitlines()) == 1
    assert "peft_star could not register the method STAR with PEFT" in message
    assert f"supports PEFT {registration_module.SUPPORTED_PEFT}" in message


def _function_is_gone(monkeypatch):
    monkeypatch.delitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.STAR)
    monkeypatch.delattr(peft.utils, "register_peft_method")


def _type_is_no_enum(monkeypatch):
    monkeypatch.setattr(peft.utils.peft_types, "PeftType", type("PeftType", (), {"LORA": "LORA"}))


def _enum_keeps_its_members_elsewhere(monkeypatch):
    class Changed(str, enum.Enum):
        LORA = "LORA"

        @classmethod
        def _missing_(cls, value):
            return cls.LORA

    monkeypatch.setattr(peft.utils.peft_types, "PeftType", Changed)
    monkeypatch.setattr(Changed, "_value2member_map_", {"LORA": Changed.LORA})
    # what a map that cannot be written to looks like
    monkeypatch.setattr(Changed, "_value2member_map_", types.MappingProxyType({"LORA": Changed.LORA}))


def _peft_has_its_own_star(monkeypatch):
    foreign = type("StarConfig", (), {"__module__": "peft.tuners.star.config"})
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType.STAR, foreign)


@pytest.mark.parametrize(
    "break_peft", [_function_is_gone, _type_is_no_enum, _enum_keeps_its_members_elsewhere, _peft_has_its_own_star]
)
def test_a_changed_peft_gives_one_clear_import_error(break_peft, monkeypatch):
    with monkeypatch.context() as context:
        break_peft(context)
        with pytest.raises(ImportError) as raised:
            registration_module.register()
    check_message(str(raised.value))
    registration_module.register()
    assert PEFT_TYPE_TO_CONFIG_MAPPING["STAR"] is StarConfig


def test_the_declared_dependency_is_the_supported_range():
    pyproject = Path(__file__).parent.parent / "pyproject.toml"
    assert f'"peft{registration_module.SUPPORTED_PEFT}"' in pyproject.read_text(encoding="utf-8")
