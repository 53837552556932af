"""Dataset rows that a model is asked about: question, images, and other columns that a task reads."""

from collections.abc import Collection
from typing import Any

from datasets import Dataset
from trl.data_utils import prepare_multimodal_messages

from .columns import check_columns, check_dataset, find_image_column, find_question_column
from .dataset_digest import dataset_digest
from .images import read_image
from .messages import question_text
from .rows import row_images, shorten


class QuestionRows:
    """
    Rows with a question and images. Only the columns that a task needs are read.

    Args:
        dataset ([`~datasets.Dataset`]):
            Rows with `images` or `image`, and a question.
        question_column (`str`, *optional*):
            Column with the questions, strings or conversational prompts. By default `prompt`, or `question` if there
            is no `prompt`.
        may_lack (`Collection[str]`, *optional*, defaults to `()`):
            Names of the arguments in `columns` whose columns the dataset may lack.
        columns (`str`, *optional*):
            Other columns to read, each under the name of the argument that chose it; `None` for no column.

    Raises:
        `TypeError`: If `dataset` is not a map-style dataset of one split.
        `ValueError`: If it has no rows, or if a column is missing.
    """

    def __init__(
        self,
        dataset: Dataset,
        question_column: str | None = None,
        may_lack: Collection[str] = (),
        **columns: str | None,
    ):
        check_dataset(dataset)
        read = {
            argument: column
            for argument, column in columns.items()
            if column is not None and (argument not in may_lack or column in dataset.column_names)
        }
        check_columns(dataset, **read)
        self.question_column = find_question_column(dataset, question_column)
        self.image_column = find_image_column(dataset)
        self.columns = columns
        names = dict.fromkeys([self.question_column, self.image_column, *read.values()])
        self.dataset = dataset.select_columns(list(names))
        self.texts = dataset.select_columns(list(read.values())).with_format(None)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.dataset[number]

    def settings(self) -> dict[str, Any]:
        """Values that identify these rows in the settings of a [`ResponseStore`]. Reads every row."""
        digest = dataset_digest(self.dataset)
        return {"question_column": self.question_column, **self.columns, "rows": len(self), "dataset": digest}

    def values(self, column: str) -> list[Any]:
        """All values of a column."""
        return list(self.texts[column])

    def value(self, number: int, argument: str) -> Any:
        """A row's value in the column that an argument chose; `None` if the dataset lacks it."""
        column = self.columns[argument]
        return self.texts[number][column] if column in self.texts.column_names else None

    def with_text(self, column: str) -> list[int]:
        """The numbers of the rows whose value in the column is neither `None` nor blank."""
        return [number for number, value in enumerate(self.values(column)) if value is not None and str(value).strip()]

    def conversation(self, number: int) -> list[dict[str, Any]]:
        """
        A row's prompt with its images, as the student reads it. If the question is a string, it becomes a user turn.

        Raises:
            `ValueError`: If the question is empty, if an image cannot be read, or if the row and its prompt have
                different numbers of images.
        """
        row = self[number]
        prompt = row[self.question_column] or ""
        if not question_text(prompt).strip():
            raise ValueError(f"`{self.question_column}` is {shorten(prompt)}, which asks nothing.")
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return prepare_multimodal_messages(prompt, images=[read_image(image) for image in row_images(row)])
