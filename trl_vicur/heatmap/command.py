"""The command `trl-vicur heatmap`."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, PeftType
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..command_parser import CommandParser
from ..cue_recovery import CueRecoveryConfig
from ..data.images import read_image
from ..hub.names import naming_model
from .plot import Figure, plot_sink_attention


@dataclass
class HeatmapArguments:
    """Arguments of `trl-vicur heatmap`."""

    model: str = field(metadata={"help": "Id or folder of the base model."})
    adapter: str = field(metadata={"help": "Id or folder of a cue recovery adapter for it."})
    question: str = field(metadata={"help": "Question about the images."})
    output: str = field(metadata={"help": "File for the figure: .png, .pdf, .svg, …"})
    revision: str | None = field(default=None, metadata={"help": "Revision of the base model."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the base model."})


def heatmap(arguments: list[str]) -> None:
    """Run `trl-vicur heatmap`."""
    parser = CommandParser(
        [HeatmapArguments],
        prog="trl-vicur heatmap",
        usage="--model MODEL --adapter ADAPTER --image IMAGE --question QUESTION --output FILE [options]",
        description="Draw what the sink token attends to: its attention over the images, at each layer that carries a "
        "module and averaged over these layers, relative to uniform attention.",
        examples="""
            trl-vicur heatmap --model Qwen/Qwen3-VL-2B-Instruct --adapter me/Qwen3-VL-2B-ViCuR \\
                --image diagram.png --question "How long is the chord AB?" --output heatmap.png
        """,
    )
    parser.add_argument("--image", action="append", required=True, help="File or URL of an image. Can be repeated.")
    args, images = parser.parse_args_and_config(arguments)
    # Check everything that needs no model before loading the model
    output = Path(args.output)
    formats = Figure().canvas.get_supported_filetypes()
    if output.suffix[1:].lower() not in formats:
        raise ValueError(f"`--output` is {args.output!r}, but must end in one of .{', .'.join(formats)}.")
    images = [read_image(name) for name in images.image]
    check_adapter(args.adapter)

    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    with naming_model(args.model):
        processor = AutoProcessor.from_pretrained(args.model, revision=args.revision)
        model = AutoModelForImageTextToText.from_pretrained(args.model, revision=args.revision, dtype=args.dtype)
    model = PeftModel.from_pretrained(model, args.adapter).to(device).eval()
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": args.question}]
    figure = plot_sink_attention(model, processor, [{"role": "user", "content": content}])
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150, bbox_inches="tight")
    Console().print(f"The heat map is in {output}", markup=False, soft_wrap=True)


def check_adapter(name: str) -> None:
    """
    Raises:
        `ValueError`: If the adapter cannot be found, or is not a cue recovery adapter.
    """
    try:
        config = PeftConfig.from_pretrained(name)
    except ValueError as error:
        raise ValueError(f"`--adapter {name}`: {error}. Name an adapter's folder or its id on the Hub.") from error
    if not isinstance(config, CueRecoveryConfig):
        raise ValueError(
            f"`--adapter {name}` is an adapter of type {PeftType(config.peft_type).value}, without sink attention. "
            "Name one of type CUE_RECOVERY, trained with `peft_config=CueRecoveryConfig()`."
        )
