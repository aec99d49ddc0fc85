"""Make an environment with a package that stands in for VBench."""

import venv
from pathlib import Path

import pytest

STAND_IN = """
import json, os, sys
class VBench:
    def __init__(self, device, full_info_dir, output_path):
        assert os.path.basename(full_info_dir) == "VBench_full_info.json"
        self.output_path = output_path
    def evaluate(self, videos_path, name, prompt_list=[], dimension_list=None, local=False,
                 read_frame=False, mode="vbench_standard", **kwargs):
        print("evaluating", dimension_list)
        if "human_action" in dimension_list:
            raise RuntimeError("no weights of UMT")
        names = [file for file in os.listdir(videos_path) if file.endswith(".mp4")]
        assert mode == "custom_input" and set(names) == set(prompt_list), (names, prompt_list)
        seen = {"ranks": "RANK" in os.environ, "python": sys.prefix, "prompts": prompt_list}
        json.dump(seen, open(os.path.join(self.output_path, "seen.json"), "w"))
        if dimension_list == ["temporal_style"]:
            return
        results = [{"video_path": n, "video_results": 0.5} for n in names]
        scores = {d: [len(d) / 100, results] for d in dimension_list}
        json.dump(scores, open(os.path.join(self.output_path, name + "_eval_results.json"), "w"))
"""


@pytest.fixture(scope="session")
def vbench_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of an environment with packages named vbench and torch.

    The environment lacks anyflow's packages.
    """
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "vbench").mkdir()
    (packages / "vbench" / "__init__.py").write_text(STAND_IN)
    cuda = "class cuda:\n    is_available = staticmethod(lambda: False)\n"
    (packages / "torch.py").write_text(f"def device(name):\n    return name\n{cuda}")
    return folder / "bin" / "python"
