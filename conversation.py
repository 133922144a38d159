"""
A conversation becomes ids and labels, by the chat template of the tokenizer.

    messages --templates.texts--> text, places of the answers --encode--> ids, labels

The tokenizer reads the text and says which characters each token covers. A token that covers a
part of an answer is trained. How the text comes about is in support/templates.py.

An image takes one place in the ids for each patch (more with tiles). There stands IMAGE_ID, an id
that no text can produce. A label is IGNORE where the model does not learn. Letters as in model.py.
"""
import itertools

from support.templates import IMAGE, IMAGE_ID, encoder_of, texts

IGNORE = -100                           # the label that cross_entropy ignores


def image_token_ids(num_patches, tokenizer):
    """Return the ids of one image. To put other ids around an image, change this function."""
    return [IMAGE_ID] * num_patches


def encode(messages, tokenizer, num_patches, template="chat"):
    """Return (ids, labels) of one conversation: two lists of T ints.

    messages: [{"role": "system"|"user"|"assistant", "content": str}, ...]. Each "<image>" in a
        user's content becomes the ids of an image. Control tokens come from the template only:
        "<|im_end|>" in a content stays text. Only "plain" keeps white space around a content.
    num_patches: the ids that an image takes, or a list of them, one for each image in the text.
    template: "chat" is the tokenizer's own chat template, or USER:/ASSISTANT: lines if it has none;
        "plain" is image, caption, newline; "prompted" writes each content and a newline.
    Each answer is trained, up to and including the token that ends its turn.
    Raises ValueError if the template cannot write these turns as they are.
    """
    ids, labels = [], []
    counts = iter(num_patches) if isinstance(num_patches, list) else itertools.repeat(num_patches)
    encoder, _, ids_of_marks = encoder_of(tokenizer)
    for text, answers in texts(messages, tokenizer, template):
        encoding = encoder.encode(text, add_special_tokens=False)
        for i, (start, end) in zip(encoding.ids, encoding.offsets):
            # SentencePiece may begin with a token of no characters. It counts as one character,
            # or the first token of an answer would not be trained.
            is_trained = any(start < to and max(end, start + 1) > at for at, to in answers)
            new = [ids_of_marks.get(i, i)]
            if new == [IMAGE_ID]:
                count = next(counts, None)
                if count is None:
                    raise ValueError(f"the text has more '{IMAGE}' than there are pictures")
                new, is_trained = image_token_ids(count, tokenizer), False
            ids += new
            labels += new if is_trained else [IGNORE] * len(new)
    return ids, labels


def encode_prompt(messages, tokenizer, num_patches, template="chat"):
    """Return the ids of messages that end with a user's turn, up to where the answer begins.

    They are the ids that encode puts before that answer.
    """
    messages = messages + [{"role": "assistant", "content": "a"}]
    ids, labels = encode(messages, tokenizer, num_patches, template)
    while labels[-1] == IGNORE:                     # what the template writes after the answer
        labels.pop()
    while labels and labels[-1] != IGNORE:          # the answer
        labels.pop()
    return ids[:len(labels)]


def eos_ids(llm, tokenizer):
    """Return the set of ids that end an answer.

    They are the end tokens of the tokenizer and of the LLM's generation config, and the token that
    the chat template writes after an answer. In a base LLM these two differ: Qwen2.5 ends a text
    with <|endoftext|>, and its template ends a turn with <|im_end|>.
    """
    ids = [tokenizer.eos_token_id]
    if llm.generation_config:
        eos = llm.generation_config.eos_token_id
        ids += eos if isinstance(eos, list) else [eos]
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            _, labels = encode(turns, tokenizer, num_patches=0)
            ids.append([label for label in labels if label != IGNORE][-1])
        except ValueError:
            pass    # This template cannot be used. In training `encode` will say so.
    return {i for i in ids if i is not None}
