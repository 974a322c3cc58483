"""hugging_face_stream.py of docs/streams.md with the Trainer of transformers."""

from pydoc_data.topics import topics

from datasets import IterableDataset
from hugging_face import fit, windows


def texts(names):
    for name in names:
        yield {"text": topics[name]}


def stream():
    data = IterableDataset.from_generator(texts, gen_kwargs={"names": sorted(topics)})
    return data.map(windows, batched=True, remove_columns="text").with_format("torch")


if __name__ == "__main__":
    fit(stream(), "runs/hugging-face-stream")
