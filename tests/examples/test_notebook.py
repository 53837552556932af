"""The notebook from images to a published adapter, executed as a user would, with a local Hub."""

import os
import re
from pathlib import Path

import nbformat
import pytest
from hub_server import HubServer
from nbclient import NotebookClient


EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOK = EXAMPLES / "images_to_adapter.ipynb"


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds_of_outputs(notebook) -> list[list[list[str]]]:
    # Libraries' output on stderr depends on the machine; kinds are sorted, as nbformat writes them
    return [
        [[o.output_type, *sorted(o.get("data", {}))] for o in cell.outputs if o.get("name") != "stderr"]
        for cell in code_cells(notebook)
    ]


@pytest.mark.slow
def test_notebook_goes_from_images_to_a_published_adapter(tmp_path, pytestconfig):
    stored, notebook = (nbformat.read(NOTEBOOK, as_version=4) for _ in range(2))
    with HubServer() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "hf_secret",
            "IPYTHONDIR": str(tmp_path / "ipython"),
            # The notebook runs outside of `examples`, so that it writes nothing there
            "PYTHONPATH": os.pathsep.join([str(EXAMPLES), os.environ.get("PYTHONPATH", "")]),
        }
        resources = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(
            notebook, timeout=None, coalesce_streams=True, record_timing=False, resources=resources
        ).execute(env=environment)  # raises the error of a cell

    assert hub.repos.keys() == {"me/easy-vqa-ViCuR"}
    files = hub.repos["me/easy-vqa-ViCuR"]
    assert files.keys() >= {"README.md", "adapter_config.json", "adapter_model.safetensors", "processor_config.json"}
    for name, content in files.items():
        assert str(tmp_path).encode() not in content and str(EXAMPLES).encode() not in content, name
    [table] = [
        output.data["text/plain"]
        for cell in code_cells(notebook)
        for output in cell.outputs
        if "grounded_accuracy" in output.get("data", {}).get("text/plain", "")
    ]
    accuracy = {name: float(grounded) for name, grounded in re.findall(r"(\w+) +\S+% +(\S+)%", table)}
    assert accuracy["student"] > accuracy["base"] + 5
    if pytestconfig.getoption("store_notebook"):
        nbformat.write(notebook, NOTEBOOK)
    else:
        assert kinds_of_outputs(notebook) == kinds_of_outputs(stored)


def test_stored_outputs_come_from_one_run_and_reveal_nothing_about_its_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert [cell.execution_count for cell in code_cells(notebook)] == [*range(1, len(code_cells(notebook)) + 1)]
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert text.count("image/png") == 2 and len(text) < 200_000
    assert not re.search(r'[\s"\'](/\w|[A-Z]:\\)|site-packages|127\.0\.0\.1|localhost', text)
