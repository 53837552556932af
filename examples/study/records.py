"""
The study's results: one file of JSON lines per domain, one record per line.

    {"kind": "run", "name": "cue+module-lr0.001-seed0", "result": {"learning_rate": 0.001, "seed": 0, …}}

| kind | name | written by |
|---|---|---|
| `base` | `base` | `run.py`: test scores of the model that students start from |
| `run` | cell, learning rate and seed | `run.py`: one trained student |
| `interventions` | the student's run | `interventions.py` |
| `wrong_evidence` | the test split, and the student's run or `base` | `wrong_evidence.py` |

Records are only appended, under a lock: several processes can write to one file, and a process that is killed loses
at most the record that it was writing. Of several records of the same kind and name, the last one counts.
"""

import fcntl
import json
from pathlib import Path
from typing import Any


RESULTS = Path(__file__).parent / "results"


def read_records(path: Path, kind: str) -> dict[str, dict[str, Any]]:
    """
    Results of one kind by name, in the order in which they were first written; empty if the file does not exist.

    Raises:
        `ValueError`: If a line other than an unfinished last one is not JSON.
    """
    if not path.exists():
        return {}
    content = path.read_bytes()
    results = {}
    for number, line in enumerate(content[: finished_length(content)].splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if record["kind"] == kind:
            results[record["name"]] = record["result"]
    return results


def append_record(path: Path, kind: str, name: str, result: dict[str, Any]) -> None:
    """Writes a record after the others, replacing a line that a killed process left unfinished."""
    line = json.dumps({"kind": kind, "name": name, "result": result}) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released when the file is closed, or its process killed
        file.seek(0)
        content = file.read()
        whole = content[: finished_length(content)]
        file.truncate(len(whole))
        # Some editors save a file without the last line break
        file.write((b"" if whole.endswith(b"\n") or not whole else b"\n") + line.encode())


def finished_length(content: bytes) -> int:
    """Bytes up to the end of the last whole record. Part of a JSON object is never JSON itself."""
    start = content.rfind(b"\n") + 1
    try:
        json.loads(content[start:])
    except ValueError:
        return start
    return len(content)
