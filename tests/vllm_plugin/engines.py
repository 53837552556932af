"""Tiny checkpoints with an adapter, vLLM engines and servers, and transformers' answers to the same prompts."""

import gc
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple


# Set before vLLM is imported
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
}

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import requests  # noqa: E402
import torch  # noqa: E402


pytest.importorskip("vllm", reason="vLLM needs a separate environment, see .ci/vllm")

from openai import OpenAI  # noqa: E402
from peft import PeftModel, get_peft_model  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_models import encode, randomize  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402

from trl_vicur import CueRecoveryConfig  # noqa: E402
from trl_vicur.generation.openai_generator import to_openai  # noqa: E402


# The smallest head size that vLLM's attention supports on a CPU
HEAD_DIM = 64
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 8, 8]}
NEW_TOKENS = 12
# `vllm serve`, which the wheel for CPUs does not install under that name
OPENAI_SERVER = ("-m", "vllm.entrypoints.openai.api_server")


class Checkpoint(NamedTuple):
    """A base model and an adapter in folders, and both in memory."""

    base: Path
    adapter: Path
    model: PeftModel
    processor: object


def make_checkpoint(directory: Path, model, processor, embedding_scale: float = 10, **config) -> Checkpoint:
    """Save a model and an adapter for it whose module changes the outputs."""
    base, adapter = directory / "base", directory / "adapter"
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(embedding_scale)  # clear winners among the next tokens
    model.save_pretrained(base)
    processor.save_pretrained(base)
    model.name_or_path = str(base)
    config = CueRecoveryConfig(layer_interval=1, **config).resolve_sink_token(processor)
    model = randomize(get_peft_model(model, config), std=1.0).eval()
    model.save_pretrained(adapter)
    return Checkpoint(base, adapter, model, processor)


@contextmanager
def engine(checkpoint: Checkpoint, adapter: Path | None, **options) -> Iterator[LLM]:
    """An engine with or without an adapter."""
    llm = None
    try:
        llm = LLM(
            str(checkpoint.base),
            hf_overrides={"cue_recovery": str(adapter)} if adapter else {},
            **{"dtype": "float32", "enforce_eager": True, "max_model_len": 2048, "max_num_seqs": 16, **options},
        )
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def runner(llm: LLM):
    """The model runner of an engine in this process."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


@contextmanager
def server(folder: Path, *arguments: str, program: tuple[str, ...] = OPENAI_SERVER, **environment) -> Iterator[str]:
    """The address of a running server for the model in a folder."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, *program, "--model", str(folder), "--port", str(port), *arguments]
    command += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8"]
    process = subprocess.Popen(
        command, env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment}, start_new_session=True
    )
    address = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None and not _is_up(address):
            time.sleep(1)
        assert process.poll() is None, "the server stopped; see its output above"
        yield address
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_up(address: str) -> bool:
    try:
        return requests.get(f"{address}/health").ok
    except requests.ConnectionError:
        return False


def generate(llm: LLM, checkpoint: Checkpoint, conversations: list[list[dict]]) -> list:
    """vLLM's greedy completions with the log-probabilities of their tokens."""
    prompts = []
    for conversation in conversations:
        blocks = [block for message in conversation for block in message["content"]]
        images = [block["image"] for block in blocks if block["type"] == "image"]
        videos = [_with_metadata(block["video"]) for block in blocks if block["type"] == "video"]
        media = ({"image": images} if images else {}) | ({"video": videos} if videos else {})
        text = checkpoint.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        prompts.append({"prompt": text} | ({"multi_modal_data": media} if media else {}))
    return llm.generate(prompts, SamplingParams(temperature=0, max_tokens=NEW_TOKENS, logprobs=0), use_tqdm=False)


def _with_metadata(frames: list[Image.Image]) -> tuple[np.ndarray, dict]:
    # All frames, with the metadata that transformers assumes by default
    count, fps = len(frames), 24
    metadata = {"fps": fps, "duration": count / fps, "total_num_frames": count, "frames_indices": list(range(count))}
    return np.stack([np.asarray(frame) for frame in frames]), metadata | {"do_sample_frames": False}


def expected_completion(checkpoint: Checkpoint, conversation: list[dict]):
    """Token ids of the prompt and of transformers' greedy completion, and the completion's log-probabilities."""
    all_frames = {"videos_kwargs": {"do_sample_frames": False}}
    inputs = encode(checkpoint.processor, [conversation], processor_kwargs=all_frames)
    with torch.no_grad():
        output = checkpoint.model.generate(
            **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    token_ids = output.sequences[0, inputs["input_ids"].size(1) :]
    logprobs = torch.stack(output.logits, dim=1)[0].log_softmax(-1).gather(1, token_ids[:, None])[:, 0]
    return inputs["input_ids"][0].tolist(), token_ids.tolist(), logprobs


def assert_equals_transformers(outputs: list, checkpoint: Checkpoint, conversations: list[list[dict]]):
    """Greedy tokens and their log-probabilities equal those of each prompt alone in transformers, in float32."""
    for output, conversation in zip(outputs, conversations, strict=True):
        prompt_ids, token_ids, logprobs = expected_completion(checkpoint, conversation)
        completion = output.outputs[0]
        assert prompt_ids == output.prompt_token_ids
        assert token_ids == list(completion.token_ids)
        served = torch.tensor([each[i].logprob for each, i in zip(completion.logprobs, token_ids, strict=True)])
        torch.testing.assert_close(served, logprobs, rtol=0, atol=1e-4)


def assert_server_equals_transformers(
    address: str, checkpoint: Checkpoint, conversations: list[list[dict]], **headers: str
):
    """The same through the chat API."""
    client = OpenAI(base_url=f"{address}/v1", api_key="-", default_headers=headers)
    for conversation in conversations:
        choice = client.chat.completions.create(
            model=str(checkpoint.base),
            messages=to_openai(conversation),
            temperature=0,
            max_completion_tokens=NEW_TOKENS,
            logprobs=True,
        ).choices[0]
        _, token_ids, logprobs = expected_completion(checkpoint, conversation)
        served = torch.tensor([token.logprob for token in choice.logprobs.content])
        assert len(served) == len(token_ids)
        torch.testing.assert_close(served, logprobs, rtol=0, atol=1e-4)
