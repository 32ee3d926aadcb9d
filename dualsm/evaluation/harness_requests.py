"""Generation requests of lm-evaluation-harness: parsing and batching."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from dualsm.generation.sampling_params import SamplingParams
from dualsm.process.errors import UserError

_DEFAULT_NEW_TOKENS = 256  # as in the harness's own models
_NEW_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class GenerationRequest(NamedTuple):
    """Options of a text to generate.

    Attributes:
      until: stop strings; the text ends before the first of them.
      new_tokens: maximum number of tokens.
      sampling: sampling parameters.
    """

    until: tuple[str, ...]
    new_tokens: int
    sampling: SamplingParams

    def stop(self, text: str) -> int:
        """Returns the index of the first stop string, or the text's length if there is none."""
        return min((text.index(string) for string in self.until if string in text), default=len(text))


def read_request(options: dict, max_length: int) -> GenerationRequest:
    """Parses a task's `generation_kwargs`; decoding is greedy unless they ask for sampling.

    Args:
      options: the `generation_kwargs`.
      max_length: the model's sequence length; at most half of it is generated.

    Raises:
      UserError: if an option is unknown or has an invalid value.
    """
    options = {name: value for name, value in options.items() if value is not None}
    until = options.pop("until", [])
    until = (until,) if isinstance(until, str) else tuple(until)
    try:
        new_tokens = [int(options.pop(name)) for name in _NEW_TOKENS if name in options]
        temperature = float(options.pop("temperature", 0.0 if not options.get("do_sample") else 1.0))
        top_k, top_p = int(options.pop("top_k", 0)), float(options.pop("top_p", 1.0))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"generation_kwargs: not a number: {error}") from error
    sampling = SamplingParams(temperature if options.pop("do_sample", True) else 0.0, top_k, top_p)
    if options:
        raise UserError(f"generation_kwargs: unsupported options {', '.join(options)}; remove them")
    count = min((new_tokens or [_DEFAULT_NEW_TOKENS])[0], max_length // 2)
    if count < 1:
        raise UserError(f"generation_kwargs: the number of tokens is {count}, but must be at least 1")
    return GenerationRequest(tuple(filter(None, until)), count, sampling)


def batch_requests(
    order: Iterable[int], requests: Sequence[GenerationRequest], batch_size: int
) -> Iterator[list[int]]:
    """Groups requests that differ only in `until` into batches.

    Args:
      order: indices into `requests`, in the order of generation.
      requests: the requests.
      batch_size: maximum number of requests per batch.

    Yields:
      The indices of each batch.
    """
    groups: dict[tuple, list[int]] = {}
    for i in order:
        members = groups.setdefault(requests[i][1:], [])
        members.append(i)
        if len(members) == batch_size:
            yield groups.pop(requests[i][1:])
    yield from groups.values()
