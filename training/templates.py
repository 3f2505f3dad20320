"""Prompt templates: how a question and its answer become tokens, and which of them are scored.

| template       | prompt, without <bos>                                  | answer, all of it scored     |
|----------------|--------------------------------------------------------|------------------------------|
| `plain`        | `Question: {q}\\nAnswer:`                               | ` {a}<eos>`                  |
| `phi`          | the same; <bos> only if the tokenizer adds it          | ` {a}<eos>`                  |
| `phi-npo-repo` | `Question: {q}\\n`, as in the NPO and TOFU repositories | `Answer: {a}<eos>`           |
| `llama-2`      | `[INST] {q} [/INST]`                                   | `{a}<eos>`                   |
| `llama-3` etc. | the tokenizer's chat template, with a system message   | `{a}` and the turn's end     |
| `chat`         | the tokenizer's chat template, without one             | `{a}` and the turn's end     |
| `auto`         | what the model was trained with here, or what the tokenizer's chat template writes, or `plain`   ||

Question and answer are tokenised SEPARATELY, so no token spans both and an answer has the same tokens after any
question. The space before an answer belongs to its first token. Tokenizers that put a space before every text
(SentencePiece) put none before an answer, which continues a text. There is exactly one <bos>, from the template or the
tokenizer.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from training.data import IGNORE_INDEX, Example, Row
from training.store import write_json
from training.tokenizer import PLAIN_ANSWER, PLAIN_PROMPT, tokenizer_hash

TEMPLATE_FILE = "template.json"  # beside a tokenizer that was saved here
DATE = "10 Apr 2025"  # some chat templates write the date: a prompt must not depend on the day


@dataclass(frozen=True)
class Tags:
    """Plain text around question and answer; the answer ends with <eos>."""

    prompt: str
    answer: str
    bos: bool = True  # whether or not the tokenizer adds it by itself; False: as the tokenizer does


@dataclass(frozen=True)
class Chat:
    """The tokenizer's own chat template."""

    markers: tuple[str, ...] = ()  # what it writes, if it is the right one
    system: str | None = None


TEMPLATES: dict[str, Tags | Chat] = {
    "plain": Tags(PLAIN_PROMPT, PLAIN_ANSWER),
    "phi": Tags(PLAIN_PROMPT, PLAIN_ANSWER, bos=False),
    "phi-npo-repo": Tags("Question: {question}\n", "Answer: {answer}", bos=False),
    "llama-2": Tags("[INST] {question} [/INST]", "{answer}"),
    "llama-3": Chat(("<|start_header_id|>",), "You are a helpful assistant."),
    "smollm": Chat(("<|im_start|>", "SmolLM"), "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    "qwen": Chat(("<|im_start|>", "Qwen"), "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    "phi-3": Chat(("<|user|>", "<|end|>")),
    "chat": Chat(),
}
NAMES = ("auto", *TEMPLATES)


class Format:
    """A tokenizer with its template: converts text to token ids.

    Args:
        tokenizer: of transformers. One without a pad token is fine: attention masks come from lengths.
        template: a name of `NAMES`.

    Raises:
        ValueError: an unknown name, a template that this tokenizer cannot write, no token to end an answer with.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "auto"):
        if template not in NAMES:
            raise ValueError(f"template: expected one of {', '.join(NAMES)}, got {template!r}")
        self.tokenizer = tokenizer
        self.template = detect(tokenizer) if template == "auto" else template
        self._parts = TEMPLATES[self.template]
        if isinstance(self._parts, Chat):
            self._check_chat(self._parts)
            self._lead, self._answer, end_id = self._turn(self._parts)
        else:
            self._lead, self._answer, end_id = "", self._parts.answer, tokenizer.eos_token_id
        if end_id is None:
            raise ValueError(
                f"template {self.template}: expected a tokenizer that can end an answer, got one without eos_token; "
                "set tokenizer.eos_token, or nothing will teach the model to stop"
            )
        self.end_id = end_id
        bos, newline, continued = tokenizer.bos_token_id, self._ids("\n"), self._ids("\na")
        adds_bos = bos is not None and tokenizer.encode("a")[:1] == [bos]
        self._bos = bos if adds_bos or getattr(self._parts, "bos", False) else None
        self._adds_space = continued[: len(newline)] == newline and continued[len(newline) :] != self._ids("a")

    @property
    def pad_token_id(self) -> int:
        """The padding token. Padding is always masked, so any id works if the tokenizer has none."""
        return 0 if self.tokenizer.pad_token_id is None else self.tokenizer.pad_token_id

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end a generation: the end of the turn, and <eos>."""
        eos = self.tokenizer.eos_token_id
        return list(dict.fromkeys(i for i in (self.end_id, eos) if i is not None))

    def prompt_text(self, question: str) -> str:
        """The text before the answer: of chat templates with special tokens, of tag templates without <bos>."""
        if isinstance(self._parts, Chat):
            return _render(self.tokenizer, question, self._parts.system) + self._lead
        return self._parts.prompt.format(question=question)

    def prompt_ids(self, question: str) -> list[int]:
        ids = self._ids(self.prompt_text(question))
        return ids if self._bos is None or ids[:1] == [self._bos] else [self._bos, *ids]

    def answer_ids(self, answer: str) -> list[int]:
        """The answer and its end token: everything that is scored."""
        return [*self.continued_ids(self._answer.format(answer=answer)), self.end_id]

    def text_ids(self, text: str) -> list[int]:
        """Plain text, without a template: <bos> where prompts begin with it, no token that ends it."""
        return [*([] if self._bos is None else [self._bos]), *self._ids(text)]

    def continued_ids(self, text: str) -> list[int]:
        """Text that continues other text, tokenised separately."""
        return self._ids("\n" + text)[len(self._ids("\n")) :] if self._adds_space else self._ids(text)

    def encode(self, rows: Iterable[Row]) -> list[Example]:
        """Examples of {"question", "answer"}: the prompt is labelled IGNORE_INDEX, the answer by itself."""
        examples = []
        for row in rows:
            prompt, answer = self.prompt_ids(row["question"]), self.answer_ids(row["answer"])
            examples.append(Example(prompt + answer, [IGNORE_INDEX] * len(prompt) + answer))
        return examples

    def save_pretrained(self, folder: Path) -> None:
        """The tokenizer, and the template's name beside it, where `auto` finds it."""
        self.tokenizer.save_pretrained(folder)
        write_json(folder / TEMPLATE_FILE, {"template": self.template})

    def hash(self) -> str:
        """sha256 of the tokenizer, the template and its options: the same text then has the same ids."""
        chat = self.tokenizer.chat_template if isinstance(self._parts, Chat) else None
        content = [tokenizer_hash(self.tokenizer), self.template, asdict(self._parts), chat, DATE, self.end_id]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        # transformers' own says `str | list[str]`, which is for lists of lists
        return cast(str, self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _check_chat(self, chat: Chat) -> None:
        if self.tokenizer.chat_template is None:
            raise ValueError(
                f"template {self.template}: the tokenizer has no chat template, so it may be that of a base model; "
                "use plain, or set tokenizer.chat_template"
            )
        written = _render(self.tokenizer, "question")
        absent = [marker for marker in chat.markers[:1] if marker not in written]
        if absent:
            raise ValueError(
                f"template {self.template}: expected a chat template that writes {absent[0]}, but the tokenizer's "
                f"writes {written!r}; use auto, or chat for the tokenizer's own"
            )

    def _turn(self, chat: Chat) -> tuple[str, str, int | None]:
        """(text that still belongs to the prompt, answer with its leading space, token that ends the turn)"""
        stand_in = "STANDIN"
        prompt = _render(self.tokenizer, "question", chat.system)
        whole = _render(self.tokenizer, "question", chat.system, stand_in)
        if not whole.startswith(prompt):
            raise ValueError(
                f"template {self.template}: expected a chat template whose prompt {prompt!r} is how the conversation "
                f"begins, but that is {whole!r}; use another template, or set tokenizer.chat_template"
            )
        lead, _, tail = whole[len(prompt) :].partition(stand_in)
        space = lead[
            len(lead.rstrip(" ")) :
        ]  # " {answer}" is in the vocabulary, " " and "{answer}" is not what is read
        added = set(self.tokenizer.added_tokens_decoder) | set(self.tokenizer.all_special_ids)
        end = next((i for i in self._ids(tail) if i in added), self.tokenizer.eos_token_id)
        return lead.removesuffix(space), space + "{answer}", end


def detect(tokenizer: PreTrainedTokenizerBase) -> str:
    """The name of the template that a model was trained with here, or that matches its tokenizer's chat template."""
    saved = Path(tokenizer.name_or_path or "none") / TEMPLATE_FILE
    if saved.is_file():
        return json.loads(saved.read_text(encoding="utf-8"))["template"]
    if tokenizer.chat_template is None:
        return "plain"
    written = _render(tokenizer, "question", answer="answer")
    if "[INST]" in written:
        return "llama-2"
    families = ((name, parts) for name, parts in TEMPLATES.items() if isinstance(parts, Chat))
    return next(name for name, chat in families if all(marker in written for marker in chat.markers))


def _render(
    tokenizer: PreTrainedTokenizerBase, question: str, system: str | None = None, answer: str | None = None
) -> str:
    """A conversation as text, up to the start of the answer or including it."""
    turns = [("system", system), ("user", question), ("assistant", answer)]
    messages = [{"role": role, "content": text} for role, text in turns if text is not None]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=answer is None, date_string=DATE
    )
    return cast(str, text)  # of one conversation, not tokenised
