"""Functions that vision_r1_test.yaml names."""

from PIL import Image

from trl_vicur.cues.answers import is_correct
from trl_vicur.data.images import read_image
from trl_vicur.data.rows import row_images


def doc_to_visual(doc: dict) -> list[Image.Image]:
    return [read_image(image) for image in row_images(doc)]


def process_results(doc: dict, results: list[str]) -> dict[str, float]:
    return {"accuracy": float(is_correct(results[0], str(doc["answer"])))}
