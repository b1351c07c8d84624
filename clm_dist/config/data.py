"""The sections `data` and `tokenizer`: which text, and which tokens it becomes."""

import codecs
import re
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, JsonValue, field_validator, model_validator

from clm_dist.config.section import MOST, Section, Seed, wrong
from clm_dist.config.shown import shown


class Template(NamedTuple):
    """`"{title}: {body}"` as literals `("", ": ", "")` and paths `("title", "body")`; there is one literal more."""

    literals: tuple[str, ...]
    paths: tuple[str, ...]


class DataConfig(Section):
    """Which text, how it is split, and how it is cut into blocks."""

    source: Literal["hub", "files", "builtin", "plugin"] = "hub"
    """Where the records come from: a Hub data set, files, the corpus that ships with Python, which has the fields
    `topic`, `text` and `paragraphs` (its prose), or what an installed package reads."""
    dataset: str | None = None
    """Hub id of the data set, for `source: hub`."""
    config: str | None = None
    """Configuration of the Hub data set."""
    revision: str | None = None
    """Branch, tag or commit of the Hub data set."""
    path: str | list[str] | None = None
    """File, glob, directory or URL (s3://, gs://, https://), or a list of them, for `source: files`."""
    records: Literal["line", "paragraph", "file"] | None = None
    """Read the named files as text, whatever their suffixes, with a record for each line, paragraph (blank lines are
    between them) or file; its field is `text`. Null goes by the suffix, and text has a record a line."""
    encoding: str | None = None
    """Encoding of files of text, JSON or CSV, by its name in Python, such as utf-16, latin-1, cp1252; null is UTF-8."""
    delimiter: str | None = None
    """Character between the fields of CSV files; null is a comma, or a tab for .tsv."""
    field: str | None = None
    """Dotted path of the list of records in JSON files that are one object, such as `{"data": [...]}`."""
    plugin: str | None = None
    """Name of an entry point `clm_dist.sources` of an installed package, for `source: plugin`; see docs/extend.md."""
    options: dict[str, JsonValue] | None = None
    """Whatever that plugin takes. Secrets do not belong here: the job is saved with the run."""
    streaming: bool = False
    """Read a Hub data set as it arrives, with no copy on this machine's disk."""
    split: str = "train"
    """Split, or a slice of it as `datasets` spells it: `train`, `train[:5000]`, `train[10%:20%]`."""
    text: str = "text"
    """Dotted path of the text inside a record; it reaches into nested records and lists: `answers.text`. Or a template
    of such paths: `"{title}\\n\\n{answers.text}"`; paths into one list are filled in item by item, and `join` stands
    between the items: `"{messages.role}: {messages.content}"`."""
    join: str | None = " "
    """Text between the items of a list that become one document; null makes every item a document of its own."""
    score: str | None = None
    """Dotted path of the score of each text, a list where the texts are one: `answers.score`; for `min_score`."""
    min_score: float | None = None
    """Leave out texts whose score is lower, or that have none."""
    deduplicate: bool = False
    """Remove documents from the train split that the eval split has, to the letter, as well, and those that repeat an
    earlier one of the train split."""
    id: str | None = None
    """Dotted path of the record's id, which `split_method: hash` hashes; null hashes the text. Not used with
    `eval_path` or `eval_split`."""
    eval_path: str | list[str] | None = None
    """Files of the eval split, as `path` names those of the train split, for `source: files`; they are read with the
    same `records`, `encoding`, `delimiter` and `field`. With this or `eval_split` all records of `split` are train, and
    `eval_fraction`, `split_method`, `seed` and `id` are not used."""
    eval_split: str | None = None
    """Split of the eval records or a slice of it, as `split` spells it: `validation`, or `train[90%:]` where `split` is
    `train[:90%]`. It is of `eval_path`, where that is set (null takes its `train`), or else of the data of `split`."""
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the records that is held out for evaluation; not used with `eval_path` or `eval_split`."""
    split_method: Literal["random", "hash"] = "random"
    """`random` is the rows of datasets' train_test_split; `hash` keeps a record on its side at every subset size. Not
    used with `eval_path` or `eval_split`."""
    seed: Seed = 42
    """Seed of the random split; not used with `eval_path` or `eval_split`."""
    block_size: Annotated[int, Field(ge=2, le=MOST)] = 128
    """Tokens in a block."""
    grouping: Literal["carry", "guide"] = "carry"
    """`carry` loses one tail a split; `guide` drops the remainder of every 1,000 records, as the guide does."""
    append_eos: bool = True
    """End every document with the tokenizer's end-of-sequence token."""
    document_mask: bool = False
    """Stop attention and the loss at the documents inside a block; positions restart at each of them."""

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, name: str | None) -> str | None:
        if name is not None and not _is_text_encoding(name):
            raise wrong(
                "data.encoding",
                f"data.encoding {shown(repr(name))} is not an encoding of text that Python knows; name one, such as "
                "utf-16, latin-1 or cp1252, or null for UTF-8",
            )
        return name

    @field_validator("delimiter")
    @classmethod
    def _delimiter_is_one_character(cls, value: str | None) -> str | None:
        if value is not None and (len(value) != 1 or not value.isascii() or value in '"\r\n\0'):
            problem = f"data.delimiter {shown(repr(value))} is not one ASCII character that can be between fields"
            raise wrong("data.delimiter", f'{problem}; write one, such as ";", "|" or, in double quotes, "\\t"')
        return value

    @model_validator(mode="after")
    def _source_is_complete(self) -> Self:
        if self.source == "hub" and not self.dataset:
            raise wrong(
                "data.dataset", "data.source is hub, so data.dataset must name a data set, e.g. dany0407/eli5_category"
            )
        if self.source == "files" and not self.path:
            raise wrong("data.path", "data.source is files, so data.path must name a file, a glob or a directory")
        if self.source == "plugin" and not self.plugin:
            raise wrong("data.plugin", "data.source is plugin, so data.plugin must name one; see docs/extend.md")
        if self.streaming and self.source != "hub":
            raise wrong("data.streaming", "data.streaming is for data.source hub; files are never copied anyway")
        for name in ("records", "encoding", "delimiter", "field", "eval_path"):
            if getattr(self, name) is not None and self.source != "files":
                field = f"data.{name}"
                raise wrong(
                    field, f"{field} is for data.source files, not {self.source}; set it to null", "data.source"
                )
        for name in ("plugin", "options"):
            if getattr(self, name) is not None and self.source != "plugin":
                field = f"data.{name}"
                raise wrong(
                    field, f"{field} is for data.source plugin, not {self.source}; set it to null", "data.source"
                )
        for name, needed in (("eval_path", "files"), ("eval_split", "a split")):
            if getattr(self, name) in ("", []):
                problem = f"data.{name} is empty; name {needed}, or null for a share of the records"
                raise wrong(f"data.{name}", problem)
        for name in ("path", "eval_path"):
            if isinstance(names := getattr(self, name), list) and "" in names:
                raise wrong(f"data.{name}", f"data.{name} has an empty name in its list; take it out")
        for name in ("delimiter", "field"):
            if getattr(self, name) is not None and self.records is not None:
                problem = (
                    f"data.{name} is not for text, as which data.records reads every file; set one of them to null"
                )
                raise wrong(f"data.{name}", problem, "data.records")
        if (self.score is None) != (self.min_score is None):
            problem = "data.score and data.min_score go together; set both or neither"
            raise wrong("data.min_score", problem, "data.score")
        literals, paths = self.text_template
        if "{" in self.text and (not all(paths) or any(c in literal for literal in literals for c in "{}")):
            raise wrong(
                "data.text", f"data.text {shown(repr(self.text))} is no template such as '{{title}}: {{answers.text}}'"
            )
        return self

    @model_validator(mode="after")
    def _eval_is_apart(self) -> Self:
        named = [self.eval_path] if isinstance(self.eval_path, str) else self.eval_path or []
        records = [name for name in named if re.search(r"\.(jsonl?|ndjson|csv|tsv)(\.\w+)?$", name)]
        if self.records is not None and records:
            problem = f"data.records {self.records} would read {records[0]} as text, with its quotes and braces"
            raise wrong("data.eval_path", f"{problem}; name files of text, or set data.records to null", "data.records")
        if (
            self.eval_path is None
            and self.eval_split is not None
            and not self.deduplicate
            and overlap(self.split, self.eval_split)
        ):
            raise wrong(
                "data.eval_split",
                f"data.eval_split {self.eval_split} has records of data.split {self.split}, or may have some, which "
                "would be trained on and evaluated; take another split, or parts beside each other with one bound, "
                "such as data.split train[:90%] and data.eval_split train[90%:]; with data.deduplicate they are taken "
                "out of the train split",
                "data.split",
            )
        return self

    @model_validator(mode="after")
    def _documents_have_ends(self) -> Self:
        if self.document_mask and not self.append_eos:
            raise wrong(
                "data.document_mask",
                "data.document_mask is true, but with data.append_eos false no document has an end; "
                "set data.append_eos to true, or data.document_mask to false",
                "data.append_eos",
            )
        return self

    @property
    def has_own_eval(self) -> bool:
        """Whether the eval split has records of its own, and all of `split` is train."""
        return self.eval_path is not None or self.eval_split is not None

    @property
    def splits_by_hash(self) -> bool:
        """Whether the hash of a record says on which side it is."""
        return self.split_method == "hash" and not self.has_own_eval

    @property
    def codec(self) -> str | None:
        """The one name that an encoding has among its names in Python; None for UTF-8."""
        name = codecs.lookup(self.encoding).name if self.encoding is not None else "utf-8"
        return None if name == "utf-8" else name

    @property
    def fills_items(self) -> bool:
        """Whether paths of the template begin alike, so that a list there is filled in item by item."""
        roots = [path.partition(".")[0] for path in dict.fromkeys(self.text_template.paths) if "." in path]
        return len(set(roots)) < len(roots)

    @property
    def text_template(self) -> Template:
        """`text` as a template; a path alone is the template `{path}`."""
        if "{" not in self.text:
            return Template(("", ""), (self.text,))
        parts = re.split(r"\{([^{}]*)\}", self.text)
        return Template(tuple(parts[::2]), tuple(parts[1::2]))


def overlap(one: str, other: str) -> bool:
    """Whether two slices, such as `train[10%:20%]`, have rows in common in a split of some length.

    Of what is no slice of one split, whoever reads it says so.
    """
    if one.partition("[")[0] != other.partition("[")[0]:
        return False
    first, second = _bounds(one), _bounds(other)
    if first is None or second is None:
        return False
    return not (_is_before(first[1], second[0]) or _is_before(second[1], first[0]))


_Bound = tuple[str, int]


def _bounds(spec: str) -> tuple[_Bound, _Bound] | None:
    """Where a slice begins and ends, each with its unit; None where it cannot be read."""
    if "[" not in spec:
        return ("%", 0), ("%", 100)
    number = r"(-?[\d_]*\d)?(%)?"
    found = re.fullmatch(rf"[^\[\]+]+\[{number}:{number}\](\(\w+\))?", spec)
    if not found:
        return None
    # `datasets` takes both numbers for percent where one is; how they are rounded to rows may be said behind the slice.
    percent = f"%{found[5] or ''}" if found[2] or found[4] else None

    def bound(number: str | None, otherwise: int) -> _Bound:
        value = int(number or 0)
        if value == 0:
            return "%", 0 if number else otherwise
        if percent:
            return percent, value % 100 if value < 0 else value
        return "rows from the end" if value < 0 else "rows", value

    return bound(found[1], 0), bound(found[3], 100)


def _is_before(end: _Bound, begin: _Bound) -> bool:
    """Whether a slice that ends there is before one that begins there, whatever the length of the split."""
    return end[0] == begin[0] and end[1] <= begin[1]


def _is_text_encoding(name: str) -> bool:
    """Whether files may be in an encoding: the codecs for parts of URLs and of programs are not for that."""
    try:
        "a".encode(name)
        return codecs.lookup(name).name not in ("idna", "punycode", "unicode-escape", "raw-unicode-escape")
    except (LookupError, ValueError):
        return False


class TokenizerTraining(Section):
    """A byte-level BPE tokenizer trained on the training split."""

    # The trainer reserves 64 bytes a token before it begins, and what it cannot have ends the process.
    vocab_size: Annotated[int, Field(ge=257, le=2**24)] = 4096
    """Tokens in the vocabulary, the 256 bytes and the end-of-sequence token included."""


class TokenizerConfig(Section):
    """The tokenizer: one that exists, or one to train; by default the model's own."""

    path: str | None = None
    """Directory or Hub id; null takes the model's."""
    train: TokenizerTraining | None = None
    """Train one on the job's own text instead."""
    engine: Literal["auto", "gigatoken", "tokenizers"] = "auto"
    """Encoder of the text: `auto` takes gigatoken where it returns the ids of tokenizers on the data's own text."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.path and self.train:
            raise wrong("tokenizer.train", "tokenizer has both path and train; keep one and set the other to null")
        return self
