"""`rankpilot memory` as README and pages have it, where `pip install -e .` brought no torch: an answer, or one line."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .pages import PAGES, ROOT, blocks_of, commands_of, write_files

HEAVY = (
    *("torch", "transformers", "huggingface_hub", "tokenizers", "peft", "trl", "accelerate", "datasets", "filelock"),
    *("psutil", "tqdm", "matplotlib", "bitsandbytes", "gymnasium", "stable_baselines3", "scipy", "pandas", "gguf"),
)
RUN = f"""
import contextlib, io, json, sys, traceback

class Absent:
    def find_spec(self, name, *arguments):
        if name.partition(".")[0] in {HEAVY}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from rankpilot.cli.main import run

for words in json.loads(sys.argv[1]):
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            status = run(words)
        except SystemExit as end:
            status = end.code
        except BaseException:
            status = traceback.format_exc()
    print(json.dumps([status, error.getvalue()]))
"""
NEEDS = re.compile(r'error: .* (needs?|requires?) .*: pip install -e "\.\[\w+\]"\.( .*)?\n')


def commands() -> Iterator[tuple[str, bool]]:
    """Each command of the planner, and whether the page says above it that it needs torch."""
    for page in (ROOT / "README.md", *PAGES):
        text, end = page.read_text(encoding="utf-8").splitlines(), 0
        for block in blocks_of(page):
            said = "This needs torch" in re.split(r"^#+ ", "\n".join(text[end : block.line]), flags=re.M)[-1]
            end = block.line + block.code.count("\n")
            lines = commands_of(block.code) if block.kind in ("bash", "text") else []
            for line in lines:
                if (command := line.removeprefix("$ ")).startswith("rankpilot memory "):
                    yield command, said


OTHERS = {
    "rankpilot memory Foo/Bar-7B --device 'RTX 4090'": True,
    "rankpilot memory llama-3.1-8b --device T4": True,
    "rankpilot memory llama-3.1-8b --device 'RTX 4090' --quantization nf4 --no-prepare-kbit": False,
    "rankpilot memory llama-3.1-8b --device 'RTX 4090' --loss chunked": False,
    "rankpilot memory llama-3.1-8b --device 'RTX 4090' --target-modules q_proj,v_proj": False,
    "rankpilot memory llama-3.1-8b --device 'RTX 4090' --target-modules v_proj": False,
    "rankpilot memory llama-3.1-8b --device 'RTX 4090' --lora-dropout 0.1": True,
    "rankpilot memory --config trl.yaml --trainer sft --device 'RTX 4090'": False,
    "rankpilot memory --config llama_factory.yaml --device 'RTX 4090'": False,
    "rankpilot memory llama-3.1-8b --device 'RTX 4090' --output out": False,
    "rankpilot memory llama-3.1-8b --device 'RTX 4090' --batch-size 4 --lengths examples/lengths.txt": False,
    "rankpilot memory llama-3.1-8b --device 'RTX 4090' --lengths rotten-tomatoes:text": True,
    "rankpilot finetune model data": True,
    "rankpilot plan model data": True,
    "rankpilot export model": True,
    "rankpilot policy evaluate uniform": True,
}
"""What people try besides, and whether it needs torch."""


def test_every_answer_or_one_line_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = [*commands()]
    assert len(shown) >= 10
    assert any(needs for _, needs in shown)
    monkeypatch.setenv("RANKPILOT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    write_files(tmp_path)
    (tmp_path / "qlora.yaml").write_text("base_model: qwen3-8b\nadapter: qlora\nload_in_4bit: true\n")
    own = "model_name_or_path: Qwen/Qwen3-8B\nper_device_train_batch_size: 1\n"
    (tmp_path / "trl.yaml").write_text(own + "use_peft: true\ndtype: bfloat16\nload_in_4bit: true\n")
    factory = "stage: sft\ndo_train: true\nfinetuning_type: lora\nbf16: true\nquantization_bit: 4\ncutoff_len: 1024\n"
    (tmp_path / "llama_factory.yaml").write_text(own + factory)
    asked = {**dict(shown), **OTHERS}
    words = json.dumps([shlex.split(command)[1:] for command in asked])
    done = subprocess.run([sys.executable, "-c", RUN, words], cwd=tmp_path, capture_output=True, text=True, check=True)
    for (command, needs), line in zip(asked.items(), done.stdout.splitlines(), strict=True):
        status, error = json.loads(line)
        assert status in ((1,) if needs else (0, 3)), f"{command}\n{status}\n{error}"
        assert NEEDS.fullmatch(error) if needs else not error, f"{command}\n{error}"
    assert (tmp_path / "out/memory.json").is_file()
