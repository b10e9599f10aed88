"""The questions for UnifiedReward's models, with `{prompt}` for the caption, in gdro's own wording.

A model answers the text it was trained on best; the option `template` reads that from a user's file.
"""

from pathlib import Path

from gdro.common.errors import UserError
from gdro.common.reading import read_text

_AXES = """\
- Alignment: does the image show what the caption says?
- Coherence: does everything in it hang together, without glitches or distorted objects?
- Style: is it pleasing to look at, whatever the caption says?
"""

_GRADES = """\
Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z
"""

POINT_2 = f"""\
Grade this generated image against its caption from 1 to 5, decimals allowed, on three axes.
{_AXES}
Answer in these three lines and nothing else:
{_GRADES}
Caption: [{{prompt}}]"""

POINT_1 = """\
Grade this generated image from 1 to 5, decimals allowed, by how well it shows its caption and by its quality.
List what the caption asks for as 'element (type): 1' if it is there and 'element (type): 0' if not, then end with
Final Score: X

Caption: [{prompt}]"""

POINT_1_WORDS = f"""\
Grade this generated image against its caption.
First say how badly each word of the caption is shown, higher being worse, in one line:
Word-wise Scores: [["word1", score1], ["word2", score2], ["[No_mistakes]", score]]
Then grade from 1 to 5, decimals allowed, on three axes.
{_AXES}
{_GRADES}
Caption: [{{prompt}}]"""

PAIR_2 = f"""\
Compare two generated images of one caption on three axes.
{_AXES}
For each axis share 1.0 between the images, more to the better one, in this form:
Alignment Score:
 Image 1: X
 Image 2: Y
Coherence Score:
 Image 1: X
 Image 2: Y
Style Score:
 Image 1: X
 Image 2: Y

Caption: [{{prompt}}]"""

PAIR_THINK = """\
Which of these two generated images is the better one for the caption 「{prompt}」? Weigh how well each shows what the
caption says, how pleasing it is, how real and detailed it looks, and whatever else matters here.
Reason inside <think> and </think>, then give the verdict inside <answer> and </answer>: exactly one of
Image 1 is better
Image 2 is better"""

PAIR_FLEX = """\
Compare two generated images of a prompt: first how well they show it, then their quality and realism, then their
beauty, each by a few points of your own choice, with reasons from what can be seen.
Prompt: [{prompt}]
Answer with one JSON object; cat_winner is of the category, winner of the whole comparison:
{"categories": [{"name": "...", "cat_reason": "...", "cat_winner": "Image 1 or Image 2"}],
 "reason": "...", "winner": "Image 1 or Image 2"}"""


def template_text(own: str, path: str | None) -> str:
    """The text of the user's file, or `own`; UserError unless it can be read and contains {prompt} exactly once."""
    if path is None:
        return own
    text = read_text(Path(path), "a text file with {prompt} in it", f"template: {path}")
    if text.count("{prompt}") != 1:
        raise UserError(f"template: {path} has {{prompt}} {text.count('{prompt}')} times; expected once")
    return text
