"""The study as the page sees it: a rater's next pair, votes, images by token; never whose images they are."""

import io
import threading
import unicodedata
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

from gdro.tools.arena.pairs import Model, Shown, deal
from gdro.tools.arena.votes import CHOICES, QUESTIONS, Study, Votes

MAX_NAME = 64  # characters of a rater's name


class Refused(Exception):
    """A refused request: its status and one line for the client."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class Arena:
    """One study of opened models. Thread-safe."""

    def __init__(self, models: Sequence[Model], votes: Votes, study: Study) -> None:
        self.stores = {model.name: model.store for model in models}
        self.votes, self.study = votes, study
        self._lock = threading.Lock()
        self._dealt: dict[str, dict[str, Shown]] = {}  # rater -> token -> pair, in the rater's order
        self._images: dict[str, tuple[str, str, int]] = {}  # token -> model, group, index

    def state(self, rater: str) -> dict[str, Any]:
        """The rater's first pair with an open question (`pair` None: all done), and the vote that undo would remove."""
        dealt = self._deal(rater)
        votes = self.votes.all(rater)
        answers: dict[int, dict[str, str]] = {}
        for vote in votes:
            answers.setdefault(vote.pair, {})[vote.question] = vote.choice
        given = [answers.get(shown.number, {}) for shown in dealt.values()]
        state: dict[str, Any] = {
            "rater": rater,
            "done": sum(len(one) == len(QUESTIONS) for one in given),
            "total": len(dealt),
            "last": None,
            "pair": None,
        }
        if votes:
            token = next(token for token, shown in dealt.items() if shown.number == votes[-1].pair)
            state["last"] = {"pair": token, "question": votes[-1].question}
        for (token, shown), one in zip(dealt.items(), given, strict=True):
            if len(one) < len(QUESTIONS):
                prompt = self.study.pairs[shown.number].prompt
                images = [f"/image/{image}" for image in shown.images]
                return state | {"pair": token, "prompt": prompt, "images": images, "answers": one}
        return state

    def vote(self, rater: str, pair: str, question: str, choice: str) -> bool:
        """Commit a vote. False if the rater has already given another answer."""
        if question not in QUESTIONS or choice not in CHOICES:
            raise Refused(HTTPStatus.BAD_REQUEST, f"no such answer: {question!r}, {choice!r}")
        return self.votes.record(rater, self._shown(rater, pair), question, choice)

    def undo(self, rater: str, pair: str, question: str) -> bool:
        """Remove the rater's last vote. False if it is not this one."""
        return self.votes.undo(rater, self._shown(rater, pair).number, question)

    def image(self, token: str) -> bytes:
        """PNG of only the pixels: re-encoded, so no metadata of the stored file leaks."""
        if token not in self._images:
            raise Refused(HTTPStatus.NOT_FOUND, "no such image")
        model, group, index = self._images[token]
        png = io.BytesIO()
        image = self.stores[model].images(group)[index]
        image.info = {}
        image.save(png, "PNG", compress_level=1)
        return png.getvalue()

    def _shown(self, rater: str, token: str) -> Shown:
        shown = self._deal(rater).get(token)
        if shown is None:
            raise Refused(HTTPStatus.NOT_FOUND, "no such pair")
        return shown

    def _deal(self, rater: str) -> dict[str, Shown]:
        with self._lock:
            if rater not in self._dealt:
                pairs = self.study.pairs
                dealt = deal(pairs, rater, seed=self.study.seed, secret=self.study.secret)
                for shown in dealt:
                    pair = pairs[shown.number]
                    for token, model in zip(shown.images, shown.models, strict=True):
                        self._images[token] = (model, pair.group, pair.index)
                self._dealt[rater] = {shown.token: shown for shown in dealt}
            return self._dealt[rater]


def rater_name(name: str) -> str:
    """The name without stray blanks and in composed form (NFC), so one rater stays one; Refused if invalid."""
    name = unicodedata.normalize("NFC", " ".join(name.split()))
    if not name or len(name) > MAX_NAME or not name.isprintable():
        raise Refused(HTTPStatus.BAD_REQUEST, f"expected a name of 1 to {MAX_NAME} printable characters")
    return name
