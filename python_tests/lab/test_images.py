"""Fine-tuning on texts with images: data, inputs, loss, whole runs, and what goes wrong."""

import csv
import json
from dataclasses import replace

import pytest
import torch
import yaml
from tiny_model import save_tiny_language_model
from tokenizers import processors

from bench import csv_rows
from eflat_ext.lab import cli
from eflat_ext.lab.data.tables import read
from eflat_ext.lab.data.texts import InputError, Texts
from eflat_ext.lab.experiment import runner
from eflat_ext.lab.finetune import comparison, loading, objective
from eflat_ext.lab.finetune.config import FinetuneConfig
from eflat_ext.lab.measure import trained_models
from eflat_ext.lab.measure.config import MeasureConfig

pytest.importorskip("PIL")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("easy_vqa")
vision_language = pytest.importorskip("examples.vision_language")
small_llava = pytest.importorskip("bench.experiments.small_llava")

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
QUESTIONS = ("what color is it?", "which color is there?")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="module")
def settings(folder):
    """To name the colour of an image that is all of one colour, or nearly."""
    (folder / "drawings").mkdir()
    rows = []
    for k in range(90):
        name, color = list(COLORS.items())[k % 3]
        shade = tuple(max(0, value - k) for value in color)
        path = f"drawings/{k}.png"
        Image.new("RGB", (64, 64), shade).save(folder / path)
        rows += [(question, name, path) for question in QUESTIONS]
    with (folder / "data.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label", "image"), *rows])
    torch.manual_seed(0)
    processor = small_llava.make_processor([*QUESTIONS, *COLORS])
    small_llava.make_model(processor.tokenizer).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return {
        "task_type": "CAUSAL_LM",
        "image_column": "image",
        "model": str(folder / "model"),
        "data": str(folder / "data.csv"),
        "target_modules": ["all-linear"],
        "steps": 60,
        "batch_size": 8,
        "full_lr": 3e-3,
        "device": "cpu",
    }


def test_images_are_found_from_the_folder_of_the_file(settings, folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    table = read(settings["data"], image_column="image")
    assert table.images[2] == str(folder / "drawings/1.png")
    assert table.kind == "single texts with images"
    assert table.rows([3]).images == [table.images[3]]
    assert len(set(table.text_keys())) == 180  # a question on another image is another question
    large = [str(folder / "A.png"), str(folder / "a.png")]
    assert len(set(Texts(["?"] * 2, ["", ""], images=large).text_keys())) == 2
    opened = [Image.open(table.images[k]) for k in (0, 1, 2)]
    same, again, other = Texts(["?"] * 3, [""] * 3, images=opened).text_keys()
    assert same == again != other


def test_the_inputs_are_the_processors(settings):
    config = FinetuneConfig(**settings)
    task = comparison.prepare(config)
    inputs, labels = comparison.collate(task, task.train, [0, 1, 2])
    messages = [
        {
            "role": "user",
            "content": [{"type": "image"}, {"type": "text", "text": task.splits.train.texts[k]}],
        }
        for k in range(3)
    ]
    expected = task.tokenizer(
        text=[
            task.tokenizer.apply_chat_template([m], add_generation_prompt=True) for m in messages
        ],
        images=[Image.open(image) for image in task.splits.train.images[:3]],
        padding=True,
        return_tensors="pt",
    )
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    for row in range(3):
        prompt = expected["input_ids"][row][expected["attention_mask"][row] == 1].tolist()
        answer = labels[row][labels[row] != -100].tolist()
        word = task.tokenizer.tokenizer.decode(answer)
        assert word == f"{task.splits.train.labels[row]} <end>"
        whole = inputs["input_ids"][row][inputs["attention_mask"][row] == 1].tolist()
        assert whole == [*prompt, *answer]
    model, _ = comparison.build(config, task, "lora", 0)
    logits = comparison.logits_of(config, model, inputs)
    own = model(**inputs, labels=labels).loss
    assert objective.loss_of(logits, labels).item() == pytest.approx(own.item(), rel=1e-5)


def test_of_a_text_with_an_image_the_label_alone_is_cut(settings):
    config = FinetuneConfig(**{**settings, "max_length": 76})
    processor = loading.load_tokenizer(settings["model"], config)
    part = replace(read(settings["data"], image_column="image").rows([0]), labels=["red " * 70])
    (row,), (label,) = objective.encode(config, processor, part)
    assert len(row["input_ids"]) == len(row["attention_mask"]) == len(label) == 76
    written = [token for token in label if token != objective.IGNORED]
    assert processor.tokenizer.decode(written) == " ".join(["red"] * len(written))
    prompt = row["input_ids"][: 76 - len(written)]
    assert processor.tokenizer.decode(prompt).endswith("what color is it ? <answer>")


def test_a_template_that_begins_a_text_begins_it_once(settings):
    config = FinetuneConfig(**settings)
    processor = loading.load_tokenizer(settings["model"], config)
    template, tokenizer = processor.chat_template, processor.tokenizer
    begin = processors.TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 1)])
    part = read(settings["data"], image_column="image").rows([0])
    ((plain,), _) = objective.encode(config, processor, part)
    tokenizer.bos_token, tokenizer.backend_tokenizer.post_processor = "<unk>", begin
    for beginning in ("", "<unk>"):
        processor.chat_template = beginning + template
        ((row,), _) = objective.encode(config, processor, part)
        assert row["input_ids"] == [1, *plain["input_ids"]]


def test_images_of_several_sizes_for_qwen2_vl(settings, tmp_path):
    """Its inputs are patches of all images in one list, and types of tokens."""
    processor = vision_language.small_processor([*QUESTIONS, *COLORS])
    config = FinetuneConfig(**settings)
    part = read(settings["data"], image_column="image").rows([0, 3, 4])
    part.images[1] = Image.new("RGB", (64, 128), COLORS["green"])
    inputs, labels = objective.encode(config, processor, part)
    batch, targets = objective.collate(processor, inputs, labels, torch.device("cpu"))
    assert batch["image_grid_thw"].shape == (3, 3)
    assert set(batch["mm_token_type_ids"].flatten().tolist()) == {0, 1}
    torch.manual_seed(0)
    model = vision_language.small_model(processor.tokenizer).eval()
    single = 0.0
    for row, label in zip(inputs, labels, strict=True):
        one, target = objective.collate(processor, [row], [label], torch.device("cpu"))
        single += objective.loss_of(model(**one).logits, target, "sum").item()
    whole = objective.loss_of(model(**batch).logits, targets, "sum").item()
    assert whole == pytest.approx(single, rel=1e-4)


def test_from_training_to_measuring(settings, folder):
    config = FinetuneConfig(**settings, method=["lora", "eflat", "full"], output_dir=folder / "run")
    run = comparison.run(config)
    metrics = {
        method: json.loads((run / method / "seed-0" / "metrics.json").read_text())
        for method in config.method
    }
    assert metrics["full"]["accuracy"] > 0.9  # by the images: the questions tell nothing
    assert metrics["eflat"]["skipped_perturbations"] == 0
    for method in config.method:
        (one,) = trained_models.find([run / method / "seed-0"])
        loaded = trained_models.load(one, MeasureConfig(part="test", device="cpu"))
        with torch.no_grad():
            values = [trained_models.loss(loaded.model, batch).item() for batch in loaded.batches]
        assert sum(values) / len(values) == pytest.approx(metrics[method]["loss"], rel=1e-4)


def test_an_experiment_with_images(settings, tmp_path):
    content = {
        "settings": {**settings, "steps": 3, "validation_size": 20, "test_size": 30},
        "tasks": {"colors": {"train_size": 24, "also_test": ["typos"]}},
        "methods": {"lora": {}, "eflat": {"rho": 0.1}},
        "seeds": [0],
        "sharpness": {
            "worst_rho": 0.1,
            "random_rho": 1.0,
            "sentences": 8,
            "layers": ["q_proj", "v_proj"],
        },
    }
    path = tmp_path / "grid.yaml"
    path.write_text(yaml.safe_dump(content))
    rows = csv_rows.read(runner.run(path))
    assert [row["status"] for row in rows] == ["ok"] * 2
    assert all(float(row["sharpness_worst"]) > 0 for row in rows)


def test_drawings_in_negative(tmp_path):
    topics = ("yes or no", "shape", "color")
    for part, count in (("train", 38575), ("test", 9673)):
        tables = {topic: small_llava.easy_vqa(part, [topic]) for topic in topics}
        assert set(tables["yes or no"].labels) == {"yes", "no"}
        assert set(tables["shape"].labels) == {"circle", "rectangle", "triangle"}
        assert sum(map(len, tables.values())) == count
    small_llava.write_negatives(tmp_path)
    for part in ("train", "test"):
        drawn, negative = (
            small_llava.easy_vqa(part, ["color"]),
            read(str(tmp_path / f"{part}.csv"), image_column="image"),
        )
        assert (drawn.texts, drawn.labels) == (negative.texts, negative.labels)
        pixels = [
            Image.open(table.images[-1]).convert("RGB").getpixel((3, 5))
            for table in (drawn, negative)
        ]
        assert [255 - value for value in pixels[0]] == list(pixels[1])


# --- what goes wrong ---------------------------------------------------------------------


def test_wrong_input_is_named(settings, tmp_path, folder):
    def prepare(**changes):
        comparison.prepare(FinetuneConfig(**{**settings, **changes}))

    with pytest.raises(InputError, match="--image-column needs --task-type CAUSAL_LM"):
        prepare(task_type="SEQ_CLS")
    with pytest.raises(
        InputError, match=r"--max-length must be greater than \d+, .* its image, got 40"
    ):
        prepare(max_length=40)
    with pytest.raises(InputError, match="no column 'picture'"):
        prepare(image_column="picture")
    with pytest.raises(InputError, match="--image-column must not be given"):
        prepare(data="movie-reviews")
    with pytest.raises(InputError, match="has no image processor"):
        prepare(model=save_tiny_language_model(tmp_path / "text"), max_length=60)
    with pytest.raises(InputError, match="there is no image"):
        (tmp_path / "data.csv").write_text("text,label,image\nwhat?,red,away.png\n")
        prepare(data=str(tmp_path / "data.csv"))
    (tmp_path / "away.png").write_bytes(b"no image")
    (tmp_path / "data.csv").write_text("text,label,image\nwhat?,red,away.png\n")
    with pytest.raises(InputError, match=r"cannot read the image .*away\.png"):
        prepare(data=str(tmp_path / "data.csv"), validation_size=0, test_data=settings["data"])


@pytest.mark.parametrize("image", [5, True, ["a.png"], {"path": "a.png"}])
def test_what_is_no_image_is_named(settings, tmp_path, image):
    row = {"text": "what?", "label": "red", "image": image}
    (tmp_path / "data.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"data.jsonl, line 1: column 'image' must be the path"):
        read(str(tmp_path / "data.jsonl"), image_column="image")


def test_what_the_processor_refuses_is_named(settings):
    config = FinetuneConfig(**settings)
    processor = loading.load_tokenizer(settings["model"], config)
    part = read(settings["data"], image_column="image").rows([0])
    with pytest.raises(InputError, match="cannot take the text '<image> what' with its image"):
        objective.encode(config, processor, replace(part, texts=["<image> what"]))
    processor.chat_template = "{{ raise_exception('no images') }}"
    with pytest.raises(InputError, match="no images"):
        objective.encode(config, processor, part)


def test_the_command_line_takes_images(settings, tmp_path):
    arguments = ["finetune", "--output-dir", str(tmp_path / "run"), "--steps", "1"]
    for name in ("task_type", "image_column", "model", "data", "device"):
        arguments += [f"--{name.replace('_', '-')}", settings[name]]
    arguments += ["--method", "eflat", "--train-size", "20", "--target-modules", "all-linear"]
    assert cli.main(arguments) == 0
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert saved["image_column"] == "image" and saved["task_type"] == "CAUSAL_LM"
