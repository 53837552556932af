"""Heat maps of the sink token's attention: `plot_sink_attention` and the command `trl-vicur heatmap`."""

import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_models import encode, make_image, make_processor, make_qwen2_5_vl, make_qwen3_vl, user

from trl_vicur import CueRecoveryConfig
from trl_vicur.cli import main
from trl_vicur.cue_recovery import SinkCrossAttention, sink_attention
from trl_vicur.heatmap import plot_sink_attention
from trl_vicur.heatmap.visual_tokens import split_into_grids


FRAMES = {"processor_kwargs": {"videos_kwargs": {"do_sample_frames": False}}}


def attach(model, **config):
    return get_peft_model(model, CueRecoveryConfig(layer_interval=1, **config)).eval()


def heat_map_axes(figure):
    """The panels with a heat map, by row."""
    return [axis for axis in figure.axes if len(axis.images) == 2]


def hottest_region(axis):
    """Left, right, top and bottom, in pixels of the picture, of the heat map's highest cell."""
    heat_map = axis.images[1]
    rows, columns = heat_map.get_array().shape
    left, right, bottom, top = heat_map.get_extent()
    row, column = divmod(int(heat_map.get_array().argmax()), columns)
    width, height = (right - left) / columns, (bottom - top) / rows
    return left + column * width, left + (column + 1) * width, top + row * height, top + (row + 1) * height


def look_at_what_changes(monkeypatch, draw):
    """
    `draw(False)`, then `draw(True)` with a sink that attends only to the visual token whose hidden state changed. So
    the drawing shows where the model sees the changed part of the picture.
    """
    seen = []

    def attention_weights(self, sink, hidden_states, visual_mask):
        seen.append(hidden_states[visual_mask])
        before = seen[(len(seen) - 1) % 3]  # of three layers
        weights = torch.zeros(1, self.num_heads, hidden_states.shape[1])
        weights[0, :, visual_mask[0].nonzero()[(seen[-1] - before).norm(dim=-1).argmax()]] = 1.0
        return weights

    monkeypatch.setattr(SinkCrossAttention, "attention_weights", attention_weights)
    draw(False)
    return draw(True)


def painted(size, centre=None, half=5):
    """A black picture with a small white square."""
    image = Image.new("RGB", size)
    if centre is not None:
        x, y = centre
        image.paste("white", (x - half, y - half, x + half, y + half))
    return image


@pytest.mark.parametrize(
    "size, centre",
    [
        ((112, 112), (15, 95)),
        ((96, 64), (80, 15)),
        ((56, 112), (45, 65)),
        ((400, 250), (315, 65)),  # the processor shrinks it
        ((90, 50), (75, 35)),  # and rounds this one's sides
        ((30, 20), (24, 5)),  # and enlarges this one
    ],
)
def test_attention_is_drawn_where_it_points(family, monkeypatch, size, centre):
    model, processor = family
    model = attach(model)
    half = 25 if size[0] > 200 else 5

    def draw(is_painted):
        image = painted(size, centre if is_painted else None, half)
        return plot_sink_attention(model, processor, user("What?", image))

    figure = look_at_what_changes(monkeypatch, draw)
    panels = heat_map_axes(figure)
    assert [axis.get_title() for axis in panels] == ["layers.1", "layers.2", "layers.3", "mean over layers"]
    for axis in panels:
        left, right, top, bottom = hottest_region(axis)
        assert left - half <= centre[0] <= right + half and top - half <= centre[1] <= bottom + half
        heat_map = axis.images[1].get_array()
        assert (heat_map > 0).sum() == 1 and heat_map.max() == heat_map.size  # one token gets all the attention
        assert axis.images[0].get_extent() == axis.images[1].get_extent() == [0, size[0], size[1], 0]
        assert axis.get_aspect() == 1


def test_images_of_different_sizes_in_rows(family, monkeypatch):
    model, processor = family
    model = attach(model)
    sizes = [(120, 60), (60, 120), (64, 64)]

    def draw(is_painted):
        images = [painted(size, (45, 20) if is_painted and size == (60, 120) else None) for size in sizes]
        return plot_sink_attention(model, processor, user("Which?", *images))

    panels = heat_map_axes(look_at_what_changes(monkeypatch, draw))
    assert len(panels) == 3 * 4
    rows = [panels[:4], panels[4:8], panels[8:]]
    num_tokens = sum(row[0].images[1].get_array().size for row in rows)
    for size, row in zip(sizes, rows, strict=True):
        for axis in row:
            assert axis.images[1].get_extent() == [0, size[0], size[1], 0]
            assert axis.images[1].get_array().max() == (num_tokens if size == (60, 120) else 0)
    left, right, top, bottom = hottest_region(rows[1][0])
    assert left <= 45 <= right and top <= 20 <= bottom


@pytest.mark.parametrize("beside_an_image", [False, True])
def test_a_row_for_each_group_of_video_frames(family, monkeypatch, beside_an_image):
    model, processor = family
    model = attach(model)
    plain = torch.full((6, 3, 64, 96), 50, dtype=torch.uint8)
    plain[:, 0] = torch.arange(6).view(6, 1, 1) * 40  # a different red in each frame
    images = [make_image(0)] if beside_an_image else []

    def draw(is_painted):
        frames = plain.clone()
        if is_painted:
            frames[2:4, :, 40:60, 70:90] = 255
        messages = user("What happens?", *images)
        messages[0]["content"].insert(0, {"type": "video", "video": frames})
        return plot_sink_attention(model, processor, messages, **FRAMES)

    figure = look_at_what_changes(monkeypatch, draw)
    panels = heat_map_axes(figure)
    assert len(panels) == 4 * (3 + len(images))
    panels = panels[4 * len(images) :]  # images come first
    hottest = [panels[row * 4].images[1].get_array().max() > 0 for row in range(3)]
    assert hottest == [False, True, False]
    left, right, top, bottom = hottest_region(panels[4])
    width, height = panels[4].images[1].get_extent()[1:3]
    assert left / width < 90 / 96 and right / width > 70 / 96 and top / height < 60 / 64 and bottom / height > 40 / 64
    # The frames are drawn as the model sees them, the first one of each pair
    pictures = [axis for axis in figure.axes if len(axis.images) == 1][len(images) :]
    labels = [f"video 1\nframes {frames}" for frames in ("1–2", "3–4", "5–6")]
    assert [axis.get_ylabel() for axis in pictures] == labels
    for number, axis in enumerate(pictures):
        expected = torch.tensor([80 * number, 50, 50])
        assert (torch.tensor(axis.images[0].get_array()[2, 2]) - expected).abs().max() <= 1
    assert pictures[1].images[0].get_array()[int(height * 50 / 64), int(width * 80 / 96)].min() >= 254


def test_drawn_values_equal_sink_attention(family):
    model, processor = family
    model = attach(model)
    for name, parameter in model.named_parameters():
        if "sink_attention" in name and "q_proj" in name:
            parameter.data *= 50  # a new module attends almost uniformly
    messages = user("Which?", make_image(0, (128, 64)), make_image(1, (64, 96)))
    inputs = encode(processor, [messages])
    visual = inputs["input_ids"][0] == model.config.image_token_id
    weights = sink_attention(model, **inputs)
    expected = torch.stack([each[0, :, visual].mean(dim=0) * visual.sum() for each in weights.values()])
    panels = heat_map_axes(plot_sink_attention(model, processor, messages))
    drawn = [torch.tensor(axis.images[1].get_array()) for axis in panels]
    for number in range(4):  # three layers, and their mean
        actual = torch.cat([drawn[number].flatten(), drawn[4 + number].flatten()])
        torch.testing.assert_close(actual, expected[number] if number < 3 else expected.mean(dim=0))
        torch.testing.assert_close(actual.mean(), torch.tensor(1.0))
    norms = {id(axis.images[1].norm) for axis in panels}
    assert len(norms) == 1, "all panels share one scale"
    norm = panels[0].images[1].norm
    assert (norm.vmin, norm.vcenter) == (0, 1) and norm.vmax == pytest.approx(max(2, max(map(torch.max, drawn))))


def test_uniform_attention_is_drawn_as_such(processor, monkeypatch):
    def attention_weights(self, sink, hidden_states, visual_mask):
        return (visual_mask / visual_mask.sum()).expand(1, self.num_heads, -1)

    monkeypatch.setattr(SinkCrossAttention, "attention_weights", attention_weights)
    messages = user("Which?", make_image(0, (128, 64)), make_image(1, (64, 96)))
    panels = heat_map_axes(plot_sink_attention(attach(make_qwen3_vl()), processor, messages))
    for axis in panels:
        assert abs(axis.images[1].get_array() - 1.0).max() < 1e-6
    assert panels[0].images[1].norm.vmax == 2  # not as narrow as its noise


@pytest.mark.parametrize("num_modules, titles, shape", [(1, 1, (1, 2)), (2, 3, (1, 4)), (8, 9, (2, 5))])
def test_many_layers_are_drawn_in_several_lines(processor, num_modules, titles, shape):
    figure = plot_sink_attention(attach(make_qwen3_vl(num_modules + 1)), processor, user("What?", make_image(0)))
    panels = heat_map_axes(figure)
    assert len({axis.get_title() for axis in panels}) == len(panels) == titles
    grid = panels[0].get_subplotspec().get_gridspec()
    assert (grid.nrows, grid.ncols) == shape


def test_sink_after_the_question(processor):
    config = CueRecoveryConfig(layer_interval=1, sink_token="<|im_end|>").resolve_sink_token(processor)
    model = get_peft_model(make_qwen3_vl(), config).eval()
    for axis in heat_map_axes(plot_sink_attention(model, processor, user("What?", make_image(0)))):
        assert axis.images[1].get_array().mean() == pytest.approx(1.0)


# --- Inputs that cannot be drawn ---


def test_conversations_that_cannot_be_drawn_are_refused(processor):
    model = attach(make_qwen3_vl())
    with pytest.raises(ValueError, match="has no image or video"):
        plot_sink_attention(model, processor, [{"role": "user", "content": "Hello"}])
    with pytest.raises(ValueError, match=r"control token '<\|image_pad\|>'"):
        plot_sink_attention(model, processor, user("<|image_pad|>", make_image(0)))
    with model.disable_adapter(), pytest.raises(ValueError, match="no active cue recovery adapter"):
        plot_sink_attention(model, processor, user("What?", make_image(0)))
    with pytest.raises(ValueError, match="no active cue recovery adapter"):
        plot_sink_attention(make_qwen3_vl(), processor, user("What?", make_image(0)))


def test_prompt_without_the_sink_token_is_refused(processor):
    model = attach(make_qwen3_vl(), sink_token="<|endoftext|>", sink_token_ids=[processor.tokenizer.pad_token_id])
    with pytest.raises(ValueError, match=r"have an image, but not the sink token '<\|endoftext\|>' of the adapter"):
        plot_sink_attention(model, processor, user("What?", make_image(0)))


def test_a_sink_that_is_the_only_visual_token(processor):
    image_token_id = processor.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    model = attach(make_qwen3_vl(), sink_token="<|image_pad|>", sink_token_ids=[image_token_id])
    with pytest.raises(ValueError, match="The sink is the only visual token of the prompt"):
        plot_sink_attention(model, processor, user("What?", make_image(0, (32, 32))))


def test_visual_tokens_without_a_known_grid_are_refused():
    problem = "type 'llava' cannot be mapped onto its images: its processor does not report"
    with pytest.raises(ValueError, match=problem):
        split_into_grids(torch.ones(1, 4), None, "llava")
    for tokens, grid in [(5, [1, 4, 4]), (8, [1, 4, 4]), (3, [1, 3, 4])]:
        with pytest.raises(ValueError, match=f"there are {tokens} of them for the {grid[1] * grid[2]} patches"):
            split_into_grids(torch.ones(1, tokens), torch.tensor([grid]), "mystery_vl")


# --- The command ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, adapters of several kinds, and pictures."""
    folder = tmp_path_factory.mktemp("heatmap")
    model = make_qwen3_vl()
    model.save_pretrained(folder / "model")
    make_processor().save_pretrained(folder / "model")
    attach(model).save_pretrained(folder / "adapter")
    attach(make_qwen3_vl(num_layers=3)).save_pretrained(folder / "other_size")
    get_peft_model(make_qwen2_5_vl(), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder / "lora")
    make_image(0, (128, 64)).save(folder / "a.png")
    make_image(1, (50, 70)).save(folder / "b.jpg")
    (folder / "text.png").write_text("no image")
    return folder


def command(folder, *options, **replaced):
    arguments = {"model": "model", "adapter": "adapter", "image": "a.png", "output": "out.png", **replaced}
    places = [word for name, value in arguments.items() for word in (f"--{name}", str(folder / value))]
    return ["heatmap", *places, "--question", "What is $x_1$?", *options]


def test_command(folder, capsys):
    assert main(command(folder, output="new/out.png")) == 0
    assert f"The heat map is in {folder}/new/out.png" in capsys.readouterr().out
    one = Image.open(folder / "new/out.png")
    assert main(command(folder, "--image", str(folder / "b.jpg"), "--dtype", "bfloat16")) == 0
    two = Image.open(folder / "out.png")
    assert one.format == two.format == "PNG"
    assert two.height > 1.5 * one.height and one.width > 800


@pytest.mark.parametrize(
    "replaced, messages",
    [
        ({"image": "missing.png"}, ["missing.png') cannot be read: the file does not exist. Replace it"]),
        ({"image": "text.png"}, ["text.png') cannot be read: it is not an image, or has an unknown format"]),
        ({"adapter": "missing"}, ["Can't find 'adapter_config.json'", "Name an adapter's folder"]),
        ({"adapter": "lora"}, ["is an adapter of type LORA", "CueRecoveryConfig()"]),
        ({"adapter": "other_size"}, ["`num_hidden_layers` 3", "Load the base model that it was trained on"]),
        ({"output": "out.txt"}, ["out.txt', but must end in one of", ".png"]),
    ],
)
def test_errors_say_what_to_do_without_a_traceback(folder, capsys, replaced, messages):
    assert main(command(folder, **replaced)) == 1
    error = capsys.readouterr().err
    assert all(message in error for message in messages) and "Traceback" not in error


def test_help_and_usage_errors(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0 and "draw what the sink token looks at" in capsys.readouterr().out
    for arguments, code in ((["heatmap", "--help"], 0), (["heatmap"], 2), (["heatmap", "--image", "a.png"], 2)):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == code


def test_without_matplotlib_the_error_names_the_extra(folder, capsys, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("trl_vicur.heatmap")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(command(folder)) == 1
    assert "pip install 'trl-vicur[heatmap]'" in capsys.readouterr().err
