"""Scores pictures by ImageReward. Run by a Python that has imscore: WEIGHTS, and [[picture, prompt], ...] on stdin."""

import json
import sys

import torch
from imscore.imreward.model import ImageReward
from PIL import Image


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ImageReward.from_pretrained(sys.argv[1]).train(False).to(device)
    scores = []
    for path, prompt in json.load(sys.stdin):
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3)
        with torch.no_grad():
            scores.append(model.score(pixels.permute(2, 0, 1)[None].float().to(device) / 255, [prompt]).item())
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
