"""The base that an adapter is served on: which one, and what can be told where it is not the training's.

A quantised base has other files than the 16-bit one it was made from, so the recorded fingerprint says
nothing about it. Its values do: decoded, they are those of the training but for rounding, and they do not
hold the adapter already.
"""

from __future__ import annotations

from pathlib import Path

from pronghorn.adapters.files import AdapterFolder
from pronghorn.errors import AdapterError, NotSupportedError, PronghornError
from pronghorn.export.onto import adapter_note
from pronghorn.export.original import original_of
from pronghorn.export.quantised_base import GIVE_BASE, held_against
from pronghorn.export.verify import recorded_base
from pronghorn.export.verify_codes import foreign
from pronghorn.export.verify_folder import Folder
from pronghorn.sources.bounds import BITSANDBYTES, quantised_kind, quantization_of
from pronghorn.sources.resolve import is_compressed, resolve_base
from pronghorn.sources.source import Source

# relative to the weight: rounding to 4 bits gives 0.1, twice 0.14, whole rows with outliers more; the weight
# of another model 1.4
_BOUND = 0.5
# of the adapter's update: 1 where it is merged, 0 where it is not; rounding moves it by some hundredths
_MERGED_SHARE = 0.5


def base_to_serve(adapter: Source, base: str | Path | None = None) -> Source:
    """The base for vLLM: the very one of the training; the 16-bit model that a base stored in NF4 was made
    from; or a quantised one, of which only names and shapes are known yet.

    Raises:
        NotSupportedError: it is stored in a format that vLLM does not read, or in one whose codes are not
            known here.
        AdapterError, SourceError, ExportError: as ``resolve_base`` and ``original_of``.
    """
    original = original_of(adapter, base) if base is not None else None
    if original is not None:
        return original[0]
    found = resolve_base(adapter, base=base, to_serve=True)
    kind = quantised_kind(quantization_of(found.config))
    if kind.startswith(BITSANDBYTES):
        raise NotSupportedError(
            f"{found.path} is stored in 4 or 8 bit by bitsandbytes ({kind}), which vLLM reads no more",
            fix="name the 16-bit model it was made from with --base, and the adapter is served on that; or "
            f"serve the merge in 4 bit: pronghorn export {adapter.path} DIR --format w4a16",
        )
    if unknown := foreign(Folder(found.path)):
        raise NotSupportedError(
            f"{found.path} is quantised with {unknown}, under which an adapter cannot be checked here",
            fix="give the base in 16 bit, or quantised with symmetric codes and a scale per group or row: "
            "pronghorn export BASE DIR --format w4a16",
        )
    return found


def base_notes(source: Source, adapter: AdapterFolder, base: Source) -> tuple[str, ...]:
    """What the user has to know about this base under this adapter, in words.

    Raises:
        AdapterError: a quantised base is of another model, has the adapter merged in, or values that are
            not finite.
    """
    trained_on = adapter_note(adapter.record)
    notes = [] if trained_on is None else [trained_on]
    if is_compressed(base):
        notes.append(_quantised_note(source, adapter, base))
    return tuple(notes)


def _quantised_note(source: Source, adapter: AdapterFolder, base: Source) -> str:
    layout = (quantization_of(base.config) or {}).get("format")
    told = f"{base.path} is quantised ({layout}), so the fingerprint of the base says nothing about it"
    place = recorded_base(source.path)
    try:
        trained = resolve_base(source, base=place) if place is not None else None
    except PronghornError:
        trained = None
    if trained is None:
        return (
            f"{told}, and the base of the training is not here to compare values with: names and shapes fit, "
            "but whether it is the same model, without the adapter merged in, was not checked"
        )
    off, share = held_against(adapter, base.path, trained)
    if not off <= _BOUND:
        raise AdapterError(
            f"{base.path} is not {trained.path} quantised: its weights are {off:.2f} off those the adapter "
            f"{source.path} was trained on, where rounding to 4 bits is 0.1 off",
            fix=GIVE_BASE,
        )
    if not share <= _MERGED_SHARE:
        raise AdapterError(
            f"{base.path} has the adapter {source.path} merged in already ({share:.0%} of its update), so it "
            "would be applied twice",
            fix=f"serve it by itself: pronghorn serve {base.path}",
        )
    return f"{told}; its values are those of {trained.path} but for rounding ({off:.3f} of their size)"
