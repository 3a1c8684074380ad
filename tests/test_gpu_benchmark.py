"""benchmarks/gpu.py: finished parts are skipped, time limits hold, and the report is there after each part."""

import importlib.util
import json
import sys

import pytest
from support import ROOT

from engine.errors import UserError


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """Return a function that runs the benchmark with these parts (name -> Python code) and returns its report."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("gpu_benchmark", ROOT / "benchmarks" / "gpu.py")
    module = sys.modules["gpu_benchmark"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SAVE_SECONDS", 0.0)

    def run(parts: dict[str, str], *words: str, minutes: float = 1.0, limit: float | None = None) -> dict:
        made = [module.Part(name, f"What of {name}?", ["-c", code], limit) for name, code in parts.items()]
        monkeypatch.setattr(module, "build_parts", lambda options: made)
        folder = tmp_path / "report"
        common = ["--device", "cpu", "--dataset", "shapes", "--output", str(folder), "--minutes", str(minutes)]
        report = module.main([*common, *words])
        assert json.loads((folder / "gpu.json").read_text()) == report
        return report

    yield run
    del sys.modules["gpu_benchmark"]


def test_finished_parts_are_skipped_and_others_run_again(gpu, tmp_path):
    mark = f"open({str(tmp_path / 'calls')!r}, 'a').write('x')"
    parts = {"good": f"{mark}; print('ten steps')", "bad": f"{mark}; raise SystemExit(3)"}
    report = gpu(parts)
    assert report["parts"]["good"]["result"] == "finished" and report["parts"]["good"]["output"] == ["ten steps"]
    assert report["parts"]["bad"]["result"] == "failed (3)"
    gpu(parts)
    assert (tmp_path / "calls").read_text() == "xxx"  # the good part ran once
    gpu(parts, "--parts", "good")
    assert (tmp_path / "calls").read_text() == "xxxx"
    page = (tmp_path / "report" / "gpu.md").read_text()
    assert "| good | What of good? | finished |" in page and "ten steps" in page


def test_a_part_gets_sigterm_at_its_limit_and_the_rest_waits_for_the_next_call(gpu, capsys):
    save = "import signal, sys, time; signal.signal(15, lambda *_: (print('saved'), sys.exit(143))); time.sleep(60)"
    report = gpu({"long": save, "next": "pass"}, minutes=0.1)
    assert report["parts"]["long"]["result"] == "stopped at its time limit"
    assert report["parts"]["long"]["output"] == ["saved"] and "next" not in report["parts"]
    assert "next: not yet run" in capsys.readouterr().out


def test_a_report_of_another_machine_is_not_mixed_up(gpu, tmp_path):
    gpu({"good": "pass"})
    path = tmp_path / "report" / "gpu.json"
    path.write_text(path.read_text().replace('"torch": "', '"torch": "0.'))
    with pytest.raises(UserError, match="(?s)another machine .*--output"):
        gpu({"good": "pass"})


def test_unknown_parts_are_a_usage_error(gpu):
    with pytest.raises(SystemExit) as stop:
        gpu({"good": "pass"}, "--parts", "better")
    assert stop.value.code == 2
