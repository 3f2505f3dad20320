"""Chat templates in the form of every family: the exact text of prompts, the ids that are scored, <bos> once."""

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from training.data import IGNORE_INDEX, collate
from training.generation import complete_all
from training.templates import NAMES, Format, detect
from training.tokenizer import train_tokenizer

CPU = torch.device("cpu")
QUESTION, ANSWER = "Who wrote “Émile”?", "Zoë O'Hara did, in 1987."
TURNS = "{% for m in messages %}"
END = "{% endfor %}{% if add_generation_prompt %}"
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nSYSTEM<|im_end|>\\n' }}{% endif %}"
    + TURNS
    + "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    + END
    + "{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA_2 = (
    "{{ bos_token }}" + TURNS + "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' </s>' }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}" + TURNS + "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
    "{% if m['role'] == 'system' %}{{ 'Today Date: ' + date_string + '\\n\\n' }}{% endif %}"
    "{{ m['content'] | trim + '<|eot_id|>' }}"
    + END
    + "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
PHI_3 = (
    TURNS + "{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}" + END + "{{ '<|assistant|>\\n' }}"
    "{% else %}{{ eos_token }}{% endif %}"
)
THINKING = (
    TURNS
    + "{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}{{ '<think>\\n\\n</think>\\n\\n' }}"
    + ("{% endif %}{{ m['content'] + '<|im_end|>\\n' }}" + END + "{{ '<|im_start|>assistant\\n' }}{% endif %}")
)
SPACED = (
    TURNS + "{{ m['role'] + ': ' + m['content'] + ' ' + eos_token + '\\n' }}" + END + "{{ 'assistant:' }}{% endif %}"
)

SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
PLAIN = f"Question: {QUESTION}\nAnswer:"


def chatml(system, question=QUESTION):
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


# name: chat template, <bos>, <eos>, prompt ids decoded, scored ids decoded
FAMILIES = {
    "plain": (None, "<s>", "</s>", f"<s>{PLAIN}", f" {ANSWER}</s>"),
    "phi": (None, "<|endoftext|>", "<|endoftext|>", PLAIN, f" {ANSWER}<|endoftext|>"),
    "phi-npo-repo": (None, "<s>", "</s>", f"Question: {QUESTION}\n", f"Answer: {ANSWER}</s>"),
    "llama-2": (LLAMA_2, "<s>", "</s>", f"<s>[INST] {QUESTION} [/INST]", f"{ANSWER}</s>"),
    "llama-3": (
        LLAMA_3,
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 10 Apr 2025\n\n"
        "You are a helpful assistant.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        f"{QUESTION}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        f"{ANSWER}<|eot_id|>",
    ),
    "smollm": (CHATML.replace("SYSTEM", SMOLLM), "<|im_start|>", "<|im_end|>", chatml(SMOLLM), f"{ANSWER}<|im_end|>"),
    "qwen": (CHATML.replace("SYSTEM", QWEN), None, "<|endoftext|>", chatml(QWEN), f"{ANSWER}<|im_end|>"),
    "phi-3": (
        PHI_3,
        "<s>",
        "<|endoftext|>",
        f"<|user|>\n{QUESTION}<|end|>\n<|assistant|>\n",
        f"{ANSWER}<|end|>",
    ),
    "chat": (SPACED, None, "</s>", f"user: {QUESTION} </s>\nassistant:", f" {ANSWER}</s>"),
}


def make_tokenizer(corpus, chat_template=None, bos="<s>", eos="</s>", pad=None, adds_bos=False):
    tokenizer = train_tokenizer(corpus.rows, vocab_size=400)
    marks = ("start_header_id", "end_header_id", "eot_id", "im_start", "im_end", "user", "assistant", "end")
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{mark}|>" for mark in marks]})
    tokenizer.add_special_tokens({name: t for name, t in {"bos_token": bos, "eos_token": eos}.items() if t})
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = bos, eos, pad
    tokenizer.chat_template = chat_template
    if adds_bos:
        processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = processor
    return tokenizer


@pytest.fixture(params=FAMILIES)
def family(request, corpus):
    chat_template, bos, eos, prompt, scored = FAMILIES[request.param]
    tokenizer = make_tokenizer(corpus, chat_template, bos, eos)
    return SimpleNamespace(name=request.param, tokenizer=tokenizer, prompt=prompt, scored=scored)


def test_prompt_and_answer_are_the_familys(family):
    format = Format(family.tokenizer, family.name)
    (example,) = format.encode([{"question": QUESTION, "answer": ANSWER}])
    length = example.labels.count(IGNORE_INDEX)
    assert family.tokenizer.decode(example.input_ids[:length]) == family.prompt
    assert family.tokenizer.decode(example.input_ids[length:]) == family.scored
    assert example.labels == [IGNORE_INDEX] * length + example.input_ids[length:]
    assert example.input_ids == format.prompt_ids(QUESTION) + format.answer_ids(ANSWER)
    assert format.stop_ids[0] == example.labels[-1] == format.end_id
    assert family.tokenizer.eos_token_id in format.stop_ids


def test_auto_finds_the_family(family):
    expected = "plain" if family.tokenizer.chat_template is None else family.name
    assert detect(family.tokenizer) == Format(family.tokenizer).template == expected


def test_question_and_answer_share_no_token(family):
    """Whatever the other one is, with answers and questions that would merge with their neighbours."""
    format = Format(family.tokenizer, family.name)
    questions, answers = ["Who?", "Answer", "\n"], ["er", "n", "The author"]
    for question in questions:
        for answer in answers:
            (example,) = format.encode([{"question": question, "answer": answer}])
            assert [i for i in example.labels if i != IGNORE_INDEX] == format.answer_ids(answer)
            assert example.input_ids[: example.labels.count(IGNORE_INDEX)] == format.prompt_ids(question)


def test_the_tokens_are_those_of_the_whole_text(family):
    """The same as in other implementations, unless a token would span both."""
    format = Format(family.tokenizer, family.name)
    ids = format.prompt_ids(QUESTION) + format.answer_ids(ANSWER)
    assert family.tokenizer.encode(family.prompt + family.scored, add_special_tokens=False) == ids


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_sentencepiece_puts_no_space_before_an_answer(scheme):
    """As in the published logs of Llama 2, where "William Shakespeare" begins with "Will" and not with "▁Will"."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    bpe.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[*special.values(), "<0x0A>"], show_progress=False)
    bpe.train_from_iterator(["Who wrote William?", "[INST] Williams will [/INST] William Shakespeare"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, **special)
    format = Format(tokenizer, "llama-2")
    first, *_, last = format.answer_ids("William Shakespeare")
    assert tokenizer.convert_ids_to_tokens(first).startswith("W") and last == tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("William Shakespeare"))[0].startswith("▁W")
    whole = tokenizer.encode("[INST] Who wrote William? [/INST]William Shakespeare", add_special_tokens=False)
    together = format.prompt_ids("Who wrote William?")[1:] + format.answer_ids("William Shakespeare")[:-1]
    assert tokenizer.decode(together) == tokenizer.decode(whole)
    spaced = Format(tokenizer, "plain").answer_ids("William")
    assert "".join(tokenizer.convert_ids_to_tokens(spaced)) == "▁William</s>"


@pytest.mark.parametrize("name", FAMILIES)
def test_bos_comes_once_also_where_the_tokenizer_adds_it(corpus, name):
    chat_template, bos, eos, *_ = FAMILIES[name]
    bos = bos or "<s>"
    tokenizer = make_tokenizer(corpus, chat_template, bos, eos, adds_bos=True)
    ids = Format(tokenizer, name).prompt_ids(QUESTION)
    assert ids[0] == tokenizer.bos_token_id
    assert ids[1] != tokenizer.bos_token_id
    if bos != "<|im_start|>":  # SmolLM's is the mark of every turn
        assert ids.count(tokenizer.bos_token_id) == 1


def test_what_a_template_writes_before_the_answer_is_prompt(corpus):
    format = Format(make_tokenizer(corpus, THINKING, bos=None, eos="<|im_end|>"))
    assert format.template == "chat"
    assert format.prompt_text("Who?").endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert format.tokenizer.decode(format.answer_ids("I.")) == "I.<|im_end|>"


def test_without_a_pad_token_eos_stays_visible(corpus):
    """The filler may be <eos> itself: masks come from lengths, so the <eos> of an answer is attended to and scored."""
    for pad in (None, "</s>"):
        format = Format(make_tokenizer(corpus, pad=pad))
        examples = format.encode([{"question": QUESTION, "answer": a} for a in ("No.", ANSWER)])
        batch = collate(examples, format.pad_token_id, CPU)
        lengths = [len(e.input_ids) for e in examples]
        assert batch["attention_mask"].sum(1).tolist() == lengths
        assert batch["labels"][0, lengths[0] - 1] == format.end_id
        assert (batch["labels"][0, lengths[0] :] == IGNORE_INDEX).all()


def test_templates_that_do_not_fit_are_refused(corpus):
    cases = [
        ("mistral", {}, "expected one of auto, plain, .*got 'mistral'"),
        ("llama-3", {"chat_template": FAMILIES["qwen"][0]}, r"writes <\|start_header_id\|>, but .*im_start"),
        ("qwen", {}, "has no chat template.*use plain"),
        ("plain", {"eos": None}, "without eos_token"),
        ("chat", {"chat_template": "{{ messages | length }}"}, "how the conversation begins"),
    ]
    for name, settings, reason in cases:
        with pytest.raises(ValueError, match=reason):
            Format(make_tokenizer(corpus, **settings), name)
    assert set(NAMES) == {"auto", *FAMILIES}


def test_the_hash_is_of_what_determines_the_ids(corpus, tmp_path):
    def tokenizer():
        return make_tokenizer(corpus, FAMILIES["qwen"][0], bos=None, eos="<|im_end|>", pad="<pad>")

    expected = Format(tokenizer()).hash()
    assert Format(tokenizer(), "qwen").hash() == expected
    used = Format(tokenizer())
    used.tokenizer(["a", "b c d"], padding=True, truncation=True, max_length=2)
    assert used.hash() == expected
    tokenizer().save_pretrained(tmp_path)
    assert Format(AutoTokenizer.from_pretrained(tmp_path)).hash() == expected
    chat, larger = tokenizer(), tokenizer()
    chat.chat_template += "{# again #}"
    larger.add_tokens(["Émile"])
    others = [Format(chat), Format(larger), Format(tokenizer(), "plain"), Format(tokenizer(), "chat")]
    assert len({expected, *(f.hash() for f in others)}) == 5


def test_generations_end_at_the_end_of_the_turn(corpus):
    """Also where the model goes on after it, and where the filler is a word."""
    format = Format(make_tokenizer(corpus, FAMILIES["qwen"][0], bos=None, eos="</s>"))
    text = [format.tokenizer.encode(t, add_special_tokens=False) for t in ("It is blue.", "<|im_end|>", "Red</s>no")]
    settings = {}

    def generate(input_ids, attention_mask, generation_config, **processors):
        settings.update(vars(generation_config))
        new = torch.tensor([[*text[0], *text[1], *text[2]], [*text[2], *([5] * (len(text[0]) + 1))]])
        return torch.cat((input_ids, new), 1)

    config = LlamaConfig(max_position_embeddings=99)
    config._attn_implementation = "eager"
    model = SimpleNamespace(
        training=False, eval=lambda: None, train=lambda mode: None, device=CPU, dtype=torch.bfloat16,
        config=config, generation_config=None, generate=generate,
    )  # fmt: skip
    assert complete_all(model, format, ["Why?", "Which colour is it?"], 9) == ["It is blue.", "Red"]
    assert settings["eos_token_id"] == format.stop_ids == [format.end_id, format.tokenizer.eos_token_id]
