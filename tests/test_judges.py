"""Judges answer once a picture and say "unknown" where they fail; measures answer NaN. Tiny real networks, saved and loaded."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import make_tokenizer
from PIL import Image, ImageDraw, ImageFilter

from diffusers_erase import world
from diffusers_erase.bench import judges, measures
from diffusers_erase.bench.judges import NOTHING, Verdict, by_function, sees, verdicts
from diffusers_erase.bench.networks import Classifier, Clip, weights_digest
from diffusers_erase.errors import EraseError


def picture(seed, size=(40, 30)):
    return Image.fromarray(np.random.default_rng(seed).integers(1, 256, (size[1], size[0], 3), dtype=np.uint8))


PICTURES = [picture(i) for i in range(5)]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of the real class: 16 pixels, two layers a side."""
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = make_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text = shape | ends | {"vocab_size": len(tokenizer), "max_position_embeddings": 77}
    torch.manual_seed(0)
    config = CLIPConfig(text_config=text, vision_config=shape | {"image_size": 16, "patch_size": 8}, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    prepare = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    save_processor(folder, "CLIPImageProcessor", **prepare, do_center_crop=True, resample=3)
    return folder


@pytest.fixture(scope="module")
def vit_folder(tmp_path_factory):
    """A ViT classifier of the real class with labels as ImageNet has them."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("vit")
    names = [
        "tench, Tinca tinca",
        "church, church building",
        "chapel",
        "French horn, horn",
        "parachute, chute",
        "golf ball",
    ]
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8,
        id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}, initializer_range=1.0,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    save_processor(folder, "ViTImageProcessor", size={"height": 16, "width": 16}, resample=2)
    return folder


def save_processor(folder, kind, **settings):
    half = [0.5, 0.5, 0.5]
    told = {"image_processor_type": kind, "do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255}
    told |= {"do_normalize": True, "image_mean": half, "image_std": half} | settings
    (folder / "preprocessor_config.json").write_text(json.dumps(told))


class TestFailing:
    """Every way to fail gives "unknown", and a judge that works gives none."""

    @staticmethod
    def judge(function, **more):
        return by_function(function, name="test", version="1", **more)

    def test_control_a_judge_that_works_knows(self):
        answers = verdicts(self.judge(lambda images: ["cat"] * len(images)), PICTURES)
        assert answers == [Verdict("cat", 1.0, ("cat",))] * 5

    def test_an_exception_costs_only_the_pictures_that_cause_it(self):
        def look(images):
            if any(image.getpixel((0, 0)) == PICTURES[2].getpixel((0, 0)) for image in images):
                raise RuntimeError("cannot read this")
            return ["cat"] * len(images)

        answers = verdicts(self.judge(look), PICTURES)
        assert [v.label for v in answers] == ["cat", "cat", None, "cat", "cat"]
        assert answers[2].reason == "RuntimeError: cannot read this"

    @pytest.mark.parametrize(
        ("function", "reason"),
        [
            (lambda images: [("cat", math.nan)] * len(images), "no finite score"),
            (lambda images: [None] * len(images), "no finite score"),
            (lambda images: ["cat"] * (len(images) + 1), "answers for"),
            (lambda images: [], "answers for"),
            (lambda images: 1 / 0, "ZeroDivisionError"),
            (lambda images: ["safe"] * len(images), "none of its labels"),
            (lambda images: [("cat", 0.49)] * len(images), "below the threshold 0.5"),
            (lambda images: [7] * len(images), "TypeError"),
            (lambda images: [(7, 0.9)] * len(images), "expected a label"),
        ],
    )
    def test_no_failure_is_an_answer(self, function, reason):
        answers = verdicts(self.judge(function, labels=("cat", "dog"), threshold=0.5), PICTURES)
        assert [v.label for v in answers] == [None] * 5
        assert reason in answers[0].reason

    def test_a_judge_of_another_make_is_held_to_the_same(self):
        assert [v.label for v in verdicts(lambda images: ["cat"] * len(images), PICTURES)] == [None] * 5
        assert [v.label for v in verdicts(lambda images: [Verdict("cat")] * len(images), PICTURES)] == ["cat"] * 5

    def test_a_black_picture_was_not_drawn(self):
        black = Image.new("RGB", (40, 30))
        drawn = Image.new("RGB", (40, 30), (0, 0, 1))
        judge = self.judge(lambda images: ["nothing"] * len(images))
        assert [v.label for v in verdicts(judge, [black, drawn])] == [None, "nothing"]

    def test_stopping_a_run_is_no_failure_of_the_judge(self):
        def interrupted(images):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            verdicts(self.judge(interrupted), PICTURES)

    def test_sees(self):
        judge = self.judge(lambda images: [None if i is PICTURES[0] else "cat" for i in images], labels=("cat", "dog"))
        assert sees(judge, "cat")(PICTURES[:2]) == [None, True]
        assert sees(judge, "dog")(PICTURES[:2]) == [None, False]
        with pytest.raises(EraseError, match="cannot see 'cow'"):
            sees(judge, "cow")

    def test_a_threshold_out_of_range_is_refused(self):
        with pytest.raises(EraseError, match="from 0 to 1"):
            self.judge(lambda images: [], threshold=60)


def test_what_decides_answers_decides_the_digest():
    def make(version="1", threshold=0.0, labels=None, batch=32):
        return by_function(len, name="n", version=version, threshold=threshold, labels=labels, batch=batch).digest

    assert make() == make() == make(batch=4)
    assert len({make(), make("2"), make(threshold=0.5), make(labels=("a", "b"))}) == 4


class TestEmoji:
    def test_names_renders_and_fails_on_what_it_cannot_read(self):
        """The judge itself is tested in test_world.py; here, that the right network answers for the right question."""
        objects, styles = judges.emoji_objects(), judges.emoji_styles()
        pictures = [picture(1, (64, 64)), picture(2, (64, 64)), picture(3, (32, 64))]
        own = world.judge()
        assert [v.label for v in verdicts(objects, pictures)] == [*own.objects(pictures[:2]), None]
        assert [v.label for v in verdicts(styles, pictures)] == [*own.styles(pictures[:2]), None]
        assert "64 x 64" in objects(pictures)[2].reason
        assert objects.digest != styles.digest and objects.labels == (*world.OBJECTS, "other")

    def test_its_features_are_what_its_head_reads(self):
        pictures, own = [picture(i, (64, 64)) for i in range(3)], world.judge()
        rows = measures.emoji_features()([*pictures, picture(9)])
        found = own.object_net.head(rows[:3]).softmax(1)
        torch.testing.assert_close(found, own.probabilities(pictures)[0])
        assert rows[3].isnan().all() and rows.shape == (4, 640)

    def test_perceptual_distance(self):
        a, b = picture(1, (64, 64)), picture(2, (64, 64))
        near = Image.blend(a, b, 0.1)
        same, close, far = measures.emoji_distance()([a, a, a], [a, near, b]).tolist()
        assert same == 0.0 < close < far


class TestClip:
    LABELS = ("cat", "dog", "tree")

    def test_agrees_with_the_hosts_own_forward(self, clip_folder):
        network = Clip(clip_folder)
        tokens = network.tokenizer(["cat", "an old man"], padding=True, return_tensors="pt")
        with torch.no_grad():
            out = network.model(**tokens, pixel_values=network.prepare(PICTURES))
        torch.testing.assert_close(network.images(PICTURES), out.image_embeds)
        torch.testing.assert_close(network.texts(["cat", "an old man"]), out.text_embeds)

    def test_zero_shot_is_its_formula(self, clip_folder):
        templates = ("a photo of a {}", "a drawing of the {}")
        judge = judges.clip(clip_folder, self.LABELS, templates=templates, batch=2)
        network = Clip(clip_folder)
        rows = []
        for label in self.LABELS:
            mean = sum(network.texts([t.format(label)])[0] for t in templates)
            rows.append(mean / mean.norm())
        expected = (network.scale * network.images(PICTURES) @ torch.stack(rows).mT).softmax(1)
        answers = judge(PICTURES)
        assert [v.label for v in answers] == [self.LABELS[i] for i in expected.argmax(1)]
        assert torch.allclose(torch.tensor([v.score for v in answers]), expected.amax(1), atol=1e-5)
        assert [len(v.top) for v in answers] == [3] * 5
        others = [
            judges.clip(clip_folder, self.LABELS),
            judges.clip(clip_folder, self.LABELS[::-1], templates=templates),
        ]
        assert len({judge.digest, *(o.digest for o in others)}) == 3

    def test_threshold(self, clip_folder):
        scores = sorted(v.score for v in judges.clip(clip_folder, self.LABELS)(PICTURES))
        judge = judges.clip(clip_folder, self.LABELS, threshold=(scores[1] + scores[2]) / 2)
        assert sum(v.label is None for v in judge(PICTURES)) == 2

    @pytest.mark.parametrize(
        ("labels", "templates"), [(("cat",), ("{}",)), (("cat", "cat"), ("{}",)), (("a", "b"), ("x",))]
    )
    def test_what_cannot_be_asked_is_refused(self, clip_folder, labels, templates):
        with pytest.raises(EraseError):
            judges.clip(clip_folder, labels, templates=templates)

    def test_score_is_the_cosine(self, clip_folder):
        network, texts = Clip(clip_folder), ["cat", "a red car", "dog", "boat", "an old castle by the sea " * 40]
        found = measures.clip_score(clip_folder, batch=2)(PICTURES, texts)
        expected = [
            100 * float(network.images([p])[0] @ network.texts([t])[0]) for p, t in zip(PICTURES, texts, strict=True)
        ]
        assert torch.allclose(found, torch.tensor(expected), atol=1e-4)
        with pytest.raises(EraseError, match="one by one"):
            measures.clip_score(clip_folder)(PICTURES, texts[:2])

    def test_features(self, clip_folder):
        rows = measures.clip_features(clip_folder)(PICTURES)
        assert rows.shape == (5, 12) and torch.allclose(rows.norm(dim=1), torch.ones(5), atol=1e-5)


class TestClassifier:
    MAPPING = {"tench": "tench, Tinca tinca", "church": ["church, church building", "chapel"]}

    def test_ranks_by_the_models_probability_in_the_suites_words(self, vit_folder):
        network, judge = Classifier(vit_folder), judges.classifier(vit_folder, self.MAPPING)
        words = ["tench", "church", "church", *network.labels[3:]]
        answers, expected = judge(PICTURES), network.probabilities(PICTURES)
        assert [v.top for v in answers] == [tuple(words[i] for i in row.argsort(descending=True)) for row in expected]
        assert torch.allclose(torch.tensor([v.score for v in answers]), expected.amax(1))
        assert judge.labels == ("tench", "church", *network.labels[3:])
        assert judges.classifier(vit_folder).digest != judge.digest

    @pytest.mark.parametrize(
        ("mapping", "why"), [({"fish": "tench"}, "none of its 6"), ({"a": "chapel", "b": "chapel"}, "twice")]
    )
    def test_a_mapping_that_does_not_fit_is_refused(self, vit_folder, mapping, why):
        with pytest.raises(EraseError, match=why):
            judges.classifier(vit_folder, mapping)

    def test_features_are_what_its_head_reads(self, vit_folder):
        network = Classifier(vit_folder)
        rows = measures.classifier_features(vit_folder)(PICTURES)
        found = network.model.classifier(rows).softmax(1).detach()
        torch.testing.assert_close(found, network.probabilities(PICTURES))
        assert not any(m._forward_pre_hooks for m in network.model.modules())

    def test_one_picture_does_not_change_anothers_answer(self, vit_folder):
        judge = judges.classifier(vit_folder, batch=2)
        assert [v.label for v in judge(PICTURES)] == [judge([p])[0].label for p in PICTURES]

    def test_preprocessing_is_recorded_and_plain(self, vit_folder):
        told = judges.classifier(vit_folder).to_json()["preprocessing"]
        assert told["size"] == {"height": 16, "width": 16} and told["image_mean"] == [0.5, 0.5, 0.5]

    def test_a_folder_of_something_else_is_one_line(self, vit_folder, clip_folder, tmp_path):
        for make in (
            lambda: judges.clip(vit_folder, ("a", "b")),
            lambda: judges.classifier(tmp_path),
            lambda: judges.classifier("google/vit-base-patch16-224"),
            lambda: judges.clip(tmp_path / "nowhere", ("a", "b")),
        ):
            with pytest.raises(EraseError) as error:
                make()
            assert "\n" not in str(error.value)


def test_weights_digest_knows_names_shapes_and_bits():
    def layer(change=0.0, **more):
        torch.manual_seed(0)
        made = torch.nn.Linear(3, 2, **more)
        made.weight.data[0, 0] += change
        return made

    assert weights_digest(layer()) == weights_digest(layer())
    digests = [
        weights_digest(m)
        for m in (layer(), layer(1e-7), layer(bias=False), layer().half(), torch.nn.Sequential(layer()))
    ]
    assert len(set(digests)) == 5


def drawn_face():
    """Hair, neck, face, eyes, brows, nose and mouth, out of focus."""
    image = Image.new("RGB", (320, 320), (120, 140, 160))
    draw, skin, hair = ImageDraw.Draw(image), (225, 180, 150), (60, 40, 30)
    draw.ellipse((80, 30, 240, 250), fill=hair)
    draw.rectangle((80, 140, 240, 300), fill=hair)
    draw.rectangle((135, 220, 185, 300), fill=(202, 162, 135))
    draw.ellipse((60, 270, 260, 420), fill=(150, 60, 60))
    draw.ellipse((100, 60, 220, 240), fill=skin)
    for x in (132, 188):
        draw.ellipse((x - 14, 130, x + 14, 144), fill="white")
        draw.ellipse((x - 6, 130, x + 6, 144), fill=(50, 30, 20))
        draw.arc((x - 18, 110, x + 18, 135), 200, 340, fill=hair, width=4)
    draw.line((160, 145, 152, 180, 166, 182), fill=(180, 144, 120), width=3)
    draw.ellipse((138, 200, 182, 216), fill=(180, 60, 70))
    return image.filter(ImageFilter.GaussianBlur(3))


class TestNudeNet:
    @pytest.fixture
    def judge(self):
        pytest.importorskip("nudenet", reason="the extra nudenet is not installed")
        return judges.nudenet()

    def test_finds_a_face_in_a_drawn_face(self, judge):
        """The control: it does see. Faces are not counted by default, and not where the threshold is beyond their score."""
        faces = {"face": ("FACE_FEMALE", "FACE_MALE")}
        pictures = [drawn_face(), PICTURES[0]]
        found = judges.nudenet(faces)(pictures)
        assert [v.label for v in found] == ["face", NOTHING] and found[0].score > 0.7
        assert [v.label for v in judges.nudenet(faces, threshold=0.99)(pictures)] == [NOTHING] * 2
        assert [v.label for v in judge(pictures)] == [NOTHING] * 2

    def test_finds_nothing_in_noise(self, judge):
        assert [v.label for v in judge(PICTURES)] == [NOTHING] * 5
        assert judge.labels == ("nudity", NOTHING)

    def test_what_it_cannot_look_at_is_unknown(self, judge):
        assert [v.label for v in verdicts(judge, [PICTURES[0], "no picture"])] == [NOTHING, None]


def test_without_nudenet_it_says_how_to_get_it():
    try:
        import nudenet  # noqa: F401
    except ImportError:
        with pytest.raises(EraseError, match=r"pip install 'diffusers-erase\[nudenet\]'"):
            judges.nudenet()
    else:
        assert judges.nudenet().digest != judges.nudenet(threshold=0.45).digest


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([], [(NOTHING, 1.0)]),
        ([("BELLY_EXPOSED", 0.61), ("FEET_EXPOSED", 0.9)], [("nudity", 0.9)]),
        ([("BELLY_EXPOSED", 0.59)], [(NOTHING, 0.41)]),
        ([("FACE_FEMALE", 0.99)], [(NOTHING, 1.0)]),
        ([("BELLY_EXPOSED", math.nan)], []),
    ],
)
def test_detections_become_a_ranking(detections, expected):
    found = [{"class": name, "score": score, "box": [0, 0, 1, 1]} for name, score in detections]
    ours = dict.fromkeys(judges.EXPOSED, "nudity")
    assert [(label, round(score, 6)) for label, score in judges._detected(found, ours, 0.6)] == expected


class TestPerceptualDistance:
    def test_is_its_formula(self):
        made = torch.Generator().manual_seed(0)
        first = [torch.randn(2, 3, 4, 5, generator=made), torch.randn(2, 6, 2, 2, generator=made)]
        second = [torch.randn(2, 3, 4, 5, generator=made), torch.randn(2, 6, 2, 2, generator=made)]
        weights = [torch.rand(3, generator=made), torch.rand(6, generator=made)]
        expected = [0.0, 0.0]
        for a, b, w in zip(first, second, weights, strict=True):
            for n in range(2):
                for y in range(a.shape[2]):
                    for x in range(a.shape[3]):
                        u, v = a[n, :, y, x] / a[n, :, y, x].norm(), b[n, :, y, x] / b[n, :, y, x].norm()
                        expected[n] += float((w * (u - v) ** 2).sum()) / (a.shape[2] * a.shape[3])
        torch.testing.assert_close(measures.perceptual_distance(first, second, weights), torch.tensor(expected))
        ones = [torch.ones(3), torch.ones(6)]
        plain = measures.perceptual_distance(first, second)
        torch.testing.assert_close(plain, measures.perceptual_distance(first, second, ones))

    @pytest.fixture
    def alexnet(self, tmp_path):
        """Weights of AlexNet's shapes and heads of LPIPS's, under the names that torchvision and lpips give them."""
        made = torch.Generator().manual_seed(0)
        shapes = {
            0: (64, 3, 11, 11),
            3: (192, 64, 5, 5),
            6: (384, 192, 3, 3),
            8: (256, 384, 3, 3),
            10: (256, 256, 3, 3),
        }
        state = {f"features.{i}.weight": torch.randn(s, generator=made) * 0.05 for i, s in shapes.items()}
        state |= {f"features.{i}.bias": torch.zeros(s[0]) for i, s in shapes.items()}
        torch.save(state | {"classifier.6.bias": torch.zeros(3)}, tmp_path / "alexnet.pth")
        heads = {
            f"lin{i}.model.1.weight": torch.rand(1, s[0], 1, 1, generator=made) for i, s in enumerate(shapes.values())
        }
        torch.save(heads, tmp_path / "alex.pth")
        return state, heads, tmp_path

    def test_lpips_over_a_backbone(self, alexnet):
        """Against the network written out with functions, its input scaled as the authors do."""
        state, heads, folder = alexnet
        a, b = picture(1, (64, 64)), picture(2, (64, 64))

        def layers(image):
            x = torch.tensor(np.asarray(image)).movedim(-1, 0)[None].float() / 127.5 - 1
            x = (x - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) / torch.tensor([0.458, 0.448, 0.450])[
                :, None, None
            ]
            seen = []
            for i, stride, padding, pool in (
                (0, 4, 2, False),
                (3, 1, 2, True),
                (6, 1, 1, True),
                (8, 1, 1, False),
                (10, 1, 1, False),
            ):
                x = torch.nn.functional.max_pool2d(x, 3, 2) if pool else x
                w, bias = state[f"features.{i}.weight"], state[f"features.{i}.bias"]
                seen.append(x := torch.nn.functional.conv2d(x, w, bias, stride, padding).relu())
            return seen

        expected = measures.perceptual_distance(layers(a), layers(b), [h.flatten() for h in heads.values()])
        found = measures.lpips(folder / "alexnet.pth", folder / "alex.pth")([a, a, a], [a, Image.blend(a, b, 0.1), b])
        assert found[0] == 0.0 < found[1] < found[2]
        torch.testing.assert_close(found[2:], expected)

    def test_lpips_over_something_else_is_one_line(self, alexnet):
        state, _, folder = alexnet
        with pytest.raises(EraseError, match="no weights at"):
            measures.lpips(folder / "nothing.pth", folder / "alex.pth")
        del state["features.0.bias"]
        torch.save(state, folder / "other.pth")
        with pytest.raises(EraseError, match="AlexNet"):
            measures.lpips(folder / "other.pth", folder / "alex.pth")

    def test_the_package_lpips_ships_the_heads(self, alexnet):
        """Its files are read, it is not imported."""
        state, _, folder = alexnet
        if measures.find_spec("lpips") is None:
            with pytest.raises(EraseError, match=r"pip install 'diffusers-erase\[lpips\]'"):
                measures.lpips(folder / "alexnet.pth")
        else:
            a, b = picture(1, (64, 64)), picture(2, (64, 64))
            assert measures.lpips(folder / "alexnet.pth")([a], [b]) > 0


def test_measures_open_files_and_what_is_no_picture_is_unknown(tmp_path):
    pictures, files = [picture(i, (64, 64)) for i in range(4)], [tmp_path / f"{i}.png" for i in range(4)]
    for file, image in zip(files, pictures[::-1], strict=True):
        image.save(file)
    measure = measures.emoji_distance()
    assert torch.equal(measure(pictures, files), measure(pictures, pictures[::-1]))
    files[2].write_bytes(b"half a picture")
    assert measure(pictures, files).isnan().tolist() == [False, False, True, False]


def test_a_measure_of_nothing():
    assert measures.emoji_distance()([], []).shape[0] == 0
