"""
Generates cues at an endpoint: throughput compared with a plain sequential loop, and memory by number of rows.

    python benchmarks/run.py --only cue_generation
    python benchmarks/cue_generation.py --base_url http://localhost:8000/v1 --model NAME  # a real endpoint

Without `--base_url`, the endpoint is a small server in another process that answers after 50 ms. A real endpoint must
not cache prompts, because both sides send the same ones. The two sides take turns; medians are reported. Memory is the
peak of what the process allocates beyond its memory after the imports (anonymous memory only, since the system can
drop pages of dataset files).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from contextlib import contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

from datasets import Dataset, Features, Image, List, Value, disable_progress_bars, load_from_disk
from matplotlib.figure import Figure
from measure import alternate, process_memory, ratio, wall_seconds
from openai import OpenAI
from PIL import Image as PILImage

from trl_vicur.cues import CUE_PROMPT, ChatResponse, OpenAIGenerator, generate_cues
from trl_vicur.data.images import read_image
from trl_vicur.generation.openai_generator import to_openai


SERVER = Path(__file__).parents[1] / "tests" / "support" / "openai_server.py"
LATENCY = 0.05  # seconds


def make_dataset(folder: Path, count: int, size: int) -> Dataset:
    """Rows with different questions and the same image, read from disk like any large dataset."""
    buffer = BytesIO()
    PILImage.effect_noise((size, size), 64).convert("RGB").save(buffer, "PNG")
    image = [{"bytes": buffer.getvalue(), "path": None}]
    features = Features({"question": Value("string"), "images": List(Image())})
    rows = {"question": [f"question {number}" for number in range(count)], "images": [image] * count}
    Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    return load_from_disk(str(folder))


@contextmanager
def scripted_endpoint():
    """The address of a test server in another process."""
    command = [sys.executable, str(SERVER), "0", str(LATENCY)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server.stdout.readline().strip()
        server.stdin.close()


def sequential_loop(dataset: Dataset, base_url: str, model: str, max_new_tokens: int) -> None:
    """The script one would write without this package: one request after another, and a JSON line per row."""
    client = OpenAI(api_key="none", base_url=base_url)
    with tempfile.TemporaryFile("w") as file:
        for number, row in enumerate(dataset):
            messages = to_openai(CUE_PROMPT.messages(row["question"], [read_image(row["images"][0])]))
            response = client.chat.completions.create(
                model=model, messages=messages, seed=number, temperature=0.0, max_completion_tokens=max_new_tokens
            )
            print(json.dumps({"row": number, "cue": response.choices[0].message.content}), file=file, flush=True)


def measure_throughput(
    num_rows: int,
    pairs: int,
    concurrency: int = 16,
    base_url: str | None = None,
    model: str = "m",
    max_new_tokens: int = 64,
) -> dict:
    """Rows per second of both sides, and the ratio of the loop's time to that of `generate_cues`."""
    endpoint = scripted_endpoint() if base_url is None else nullcontext(base_url)
    with tempfile.TemporaryDirectory() as folder, endpoint as base_url:
        dataset = make_dataset(Path(folder) / "dataset", num_rows, size=64)

        def with_generate_cues() -> None:
            generator = OpenAIGenerator(model, base_url, concurrency=concurrency, max_new_tokens=max_new_tokens)
            generate_cues(dataset, generator, tempfile.mkdtemp(dir=folder))

        sides = {
            "generate_cues": with_generate_cues,
            "sequential loop": lambda: sequential_loop(dataset, base_url, model, max_new_tokens),
        }
        times = alternate(sides, repeats=pairs, warmup=0, time_call=wall_seconds)
    return {
        "rows_per_second": {name: num_rows / median(seconds) for name, seconds in times.items()},
        "ratio": ratio(times["sequential loop"], times["generate_cues"]),
    }


class InstantGenerator:
    """Replies at once, so that a hundred thousand rows take a minute. Reads every image, like any generator."""

    settings = {"generator": "instant", "model": "none"}

    def generate(self, requests):
        for request in requests:
            request.messages()
            yield ChatResponse(request.number, f"The evidence for row {request.number} is at the left. " * 5)


def measure_memory_here(folder: str, output: str) -> None:
    """Prints the peak memory of a run in this process, above that before it."""
    dataset = load_from_disk(folder)
    before = highest = process_memory("RssAnon")
    done = threading.Event()

    def watch():
        nonlocal highest
        while not done.wait(0.02):
            highest = max(highest, process_memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    elapsed = wall_seconds(lambda: generate_cues(dataset, InstantGenerator(), output))
    done.set()
    watcher.join()
    print(json.dumps({"mebibytes": (highest - before) / 2**20, "rows_per_second": len(dataset) / elapsed}))


def measure_memory(counts: list[int]) -> dict:
    """Peak memory for each number of rows, each in its own process."""
    results = {}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            make_dataset(Path(folder) / "dataset", count, size=32)
            command = [sys.executable, __file__, "--memory_of", f"{folder}/dataset", f"{folder}/out"]
            result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
            results[count] = json.loads(result.stdout.splitlines()[-1])
    return results


def run(quick: bool = False) -> dict[str, Any]:
    disable_progress_bars()
    throughput = measure_throughput(100 if quick else 400, pairs=1 if quick else 3)
    print(f"{throughput['rows_per_second']}, ratio {throughput['ratio']['median']:.1f}", flush=True)
    memory = measure_memory([1_000] if quick else [1_000, 10_000, 100_000])
    print(memory)
    return {"throughput": throughput, "memory": memory}


def plot(results: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 3.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    rates = results["throughput"]["rows_per_second"]
    left.bar_label(left.bar(list(rates), list(rates.values()), color=["C0", "0.7"]), fmt="{:.0f}")
    left.set_title("rows per second", fontsize=10)
    memory = {int(count): result["mebibytes"] for count, result in results["memory"].items()}
    right.semilogx(list(memory), list(memory.values()), "o-")
    right.set_ylim(bottom=0)
    right.set_title("peak memory above the imports, MiB", fontsize=10)
    right.set_xlabel("rows")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400, help="rows of the throughput measurement")
    parser.add_argument("--pairs", type=int, default=3, help="turns of each side")
    parser.add_argument("--concurrency", type=int, default=16, help="requests in flight")
    parser.add_argument("--base_url", help="URL of a real endpoint")
    parser.add_argument("--model", default="m", help="name of the endpoint's model")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="maximum length of a cue, in tokens")
    parser.add_argument("--memory_of", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    disable_progress_bars()
    if args.memory_of is not None:
        measure_memory_here(*args.memory_of)
        return
    throughput = measure_throughput(
        args.rows, args.pairs, args.concurrency, args.base_url, args.model, args.max_new_tokens
    )
    print(json.dumps(throughput, indent=2))


if __name__ == "__main__":
    main()
