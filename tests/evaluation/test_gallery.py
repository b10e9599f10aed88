"""What stands under an image of the report."""

from PIL import Image

from gdro.evaluation.gallery import figure

IMAGE = Image.new("RGB", (8, 8))


def test_what_was_recognized() -> None:
    assert figure(IMAGE, 0.5, {}, "")["text"] is None
    assert figure(IMAGE, 0.5, {"text": "BAKE", "lines": []}, "")["text"] == "BAKE"
    objects = [{"class": "circle", "color": "red"}, {"class": "cat", "color": None}]
    assert figure(IMAGE, 0.5, {"detections": objects}, "")["text"] == "red circle, cat"
    assert figure(IMAGE, 0.5, {"detections": []}, "")["text"] == ""
