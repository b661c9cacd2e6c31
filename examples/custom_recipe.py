"""A kind of task of one's own: causal LM on texts that are trained backwards, word by word.

    python -m rolora.train --task-type examples/custom_recipe.py --train-file texts.jsonl \\
        --eval-file more.jsonl --model FOLDER

`texts.jsonl` has a column `text`. Prints what every run prints. A recipe that is not close to a
shipped one implements the protocol in `rolora/recipes/__init__.py` itself.
"""

from rolora.data import cells
from rolora.data.files import Column
from rolora.recipes.causal_lm import CausalLM


class Backwards(CausalLM):
    """Every token but the first carries loss, from the last word of a text to its first."""

    @classmethod
    def columns(cls, task):
        return {"--text-column": Column(task.text_column, cells.text)}

    @classmethod
    def build(cls, task, tokenizer, rows, device, labels=None):
        return cls(tokenizer, task.max_length, task.text_column, device=device)

    def encode(self, rows):
        column = self.response_column
        turned = [" ".join(reversed(row[column].split())) for row in rows]
        return super().encode([{column: text} for text in turned])


RECIPE = Backwards
