"""The judge's question about an image, and the parser of its reply.

The published judge prompt is part of a script (github.com/CodeGoat24/UniGenBench, `eval/`) that is not copied
here. `own_prompt` asks the same question, with the same parts and for the same form of reply, in gdro's words;
`published.published_prompt` takes the exact words from the user's copy of that script.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from gdro.common.errors import UserError
from gdro.common.files import fingerprint
from gdro.common.prompts import Prompt
from gdro.rewards.judges.answers import answer, listed
from gdro.tools.unigenbench.criteria import MEANINGS

FIELDS = ("prompt", "testpoint", "explanation", "test_explanation")


@dataclass(frozen=True)
class JudgePrompt:
    """The question about an image of a prompt with its test points.

    `template` has the placeholders `{prompt}`, `{testpoint}` (the names, as a Python list), `{explanation}` and
    `{test_explanation}`: what the points mean in general, and what they ask for in this prompt, each a list of lines
    between two `brackets`.
    """

    source: str  # "gdro", or the script it was taken from
    template: str
    meanings: Mapping[str, str]
    brackets: Mapping[str, tuple[str, str]]  # of explanation and test_explanation
    lent: tuple[str, ...] = ()  # points that the script does not define, with gdro's meanings

    @property
    def digest(self) -> str:
        """Changes with every word."""
        return fingerprint({name: value for name, value in asdict(self).items() if name != "source"})

    def check(self, prompts: list[Prompt]) -> None:
        """Raise UserError if a test point has no meaning here."""
        for prompt in prompts:
            for point in prompt.fields["points"]:
                if point not in self.meanings:
                    raise UserError(
                        f"--judge-prompt: {self.source} does not define {json.dumps(point, ensure_ascii=False)}; "
                        "expected the published script for this file's language"
                    )

    def question(self, prompt: Prompt) -> str:
        """The question about an image of the prompt, as text."""
        points, descriptions = prompt.fields["points"], prompt.fields["descriptions"]
        lists = {
            "explanation": [f"\n{point}: {self.meanings[point]}" for point in points],
            "test_explanation": [f"\n{point}: {text}" for point, text in zip(points, descriptions, strict=True)],
        }
        filled = {name: "".join([begin, *lists[name], end]) for name, (begin, end) in self.brackets.items()}
        return self.template.format(prompt=prompt.text, testpoint=points, **filled)


_TEMPLATES = {
    "en": """You check an image that a model made from a text prompt. Say for each checkpoint whether the image shows \
what the prompt asks for there.

The prompt: 「{prompt}」
The checkpoints, in order: {testpoint}
{explanation}
{test_explanation}

1. Go through the checkpoints one by one. Describe what the image shows of each, and compare it with what is asked for.
2. Give each checkpoint 1 if the image fulfills it and 0 if it does not.

Judge by what can be seen. Do not guess at what is hidden or unclear, and do not make up a story around it.

Answer in exactly this form:

<description>
<prompt>{prompt}</prompt>
<checkpoint>{testpoint}</checkpoint>
<analysis>a list in square brackets with one string for each checkpoint: your reasons</analysis>
<score>a list in square brackets with one number for each checkpoint: 0 or 1</score>
</description>
""",
    "zh": """请检查一张由模型根据提示词生成的图像，逐个考点判断图像是否做到了提示词在该考点上的要求。

提示词：「{prompt}」
考点（按顺序）：{testpoint}
{explanation}
{test_explanation}

1. 逐个考点说明图像中看到的内容，并与要求进行比较。
2. 图像满足该考点则记1分，否则记0分。

只根据看得见的内容判断。不要猜测被遮挡或不清楚的部分，也不要编造情节。

请严格按照以下格式回答：

<description>
<prompt>{prompt}</prompt>
<checkpoint>{testpoint}</checkpoint>
<analysis>方括号列表，每个考点对应一个字符串，写出判断的理由</analysis>
<score>方括号列表，每个考点对应一个数字：0或者1</score>
</description>
""",
}
_BRACKETS = {
    "en": {
        "explanation": ("What the checkpoints mean: 「", "\n」"),
        "test_explanation": ("What they ask for in this prompt: 「", "\n」"),
    },
    "zh": {
        "explanation": ("考点的含义：「", "\n」"),
        "test_explanation": ("考点在这条提示词中的要求：「", "\n」"),
    },
}


def own_prompt(language: str) -> JudgePrompt:
    """gdro's own judge prompt for a language."""
    return JudgePrompt("gdro", _TEMPLATES[language], MEANINGS[language], _BRACKETS[language])


def read_scores(reply: str, count: int) -> list[int] | None:
    """The `count` zeros and ones between the last `<score>` and `</score>`; None if they are not in that form.

    The published code also requires the analyses to be a Python list, which a quotation mark in them can break; the
    scores do not depend on them.
    """
    begun = re.split("<score>", answer(reply) or "", flags=re.IGNORECASE)
    inside = re.split("</score>", begun[-1], maxsplit=1, flags=re.IGNORECASE)
    if len(begun) < 2 or len(inside) < 2:
        return None
    scores = listed(inside[0])
    return [int(score) for score in scores] if scores and len(scores) == count and set(scores) <= {0, 1} else None
