"""The options of `bll train --only K`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from blocklocal.lab.arguments import parse, parse_known
from blocklocal.lab.errors import UserError
from blocklocal.lab.one_block.activations import Activations
from blocklocal.lab.one_block.alone import check_alone
from blocklocal.lab.one_block.folder import ELSEWHERE, BlockRun
from blocklocal.lab.ranges import Range
from blocklocal.lab.settings import Settings, flag
from blocklocal.lab.training.recipes import DIGITS, recipe, refuse_code

PROG = "bll train --only"


@dataclass(frozen=True)
class Options:
    """Train one block alone: block 0 from the data, a later one from the activations that bll cache has stored.

    All other options are those of bll train, see bll train --help. For a later block they come from the cache: only
    --out, --save-every, --device and --threads may be others.
    """

    only: Annotated[int, Range(least=0)]
    """the block to train, numbered from 0"""
    from_: Annotated[Path | None, arg(name="from")] = None
    """folder of the cache behind the block before it; with --resume, if it is no longer where it was"""


@dataclass(frozen=True)
class Request:
    """What is to be trained: block `block` with these settings, on a cache, or on the data if it is None."""

    block: int
    settings: Settings
    cache: Activations | None

    @property
    def run(self) -> BlockRun:
        folder = self.settings.folder
        return BlockRun(folder if self.settings.out else folder.with_name(f"{folder.name}-block{self.block}"))


def request_from(args: Sequence[str]) -> Request:
    """What the arguments ask for.

    UserError: arguments that are unusable, or contradict the cache or the block to resume.
    """
    options, rest = parse_known(Options, args, prog=PROG)
    data = parse(Settings, rest, prog=PROG, default=DIGITS).data
    given = parse(Settings, rest, prog=PROG, default=recipe(data))
    if options.only == 0 and options.from_ is not None:
        raise UserError("--only 0 reads the data: leave --from out")
    run = Request(options.only, given, None).run
    if given.resume:
        if run.block != options.only:
            raise UserError(f"{str(run.path)!r} holds block {run.block}: resume it with --only {run.block}")
        stored, place = run.settings(), run.path
    elif options.only == 0:
        check_alone(given)
        return Request(0, given, None)
    else:
        stored, place = None, None
    cache = _cache(options, run, resume=given.resume)
    if stored is None or place is None:
        assert cache is not None
        stored, place = cache.settings, cache.path
    if not given.trust:
        refuse_code(stored, run=place, repeated=given)
    base = replace(stored, out=given.out, resume=given.resume, trust=given.trust)
    settings = parse(Settings, rest, prog=PROG, default=base)
    changed = [name for name in base.contradictions(settings) if name not in map(flag, ELSEWHERE[1:])]
    if changed:
        raise UserError(f"{', '.join(changed)} differs from what {str(place)!r} was made with: leave it out")
    check_alone(settings)
    return Request(options.only, settings, cache)


def _cache(options: Options, run: BlockRun, *, resume: bool) -> Activations | None:
    """UserError: there is none, or not one for this block, or not the one that the block to resume was trained on."""
    k = options.only
    if k == 0:
        return None
    upstream = run.upstream if resume else None
    folder = options.from_ or (Path(upstream["path"]) if upstream else None)
    if folder is None:
        raise UserError(f"--only {k} reads the activations behind block {k - 1}: name their cache with --from")
    cache = Activations(folder)
    border = cache.contents.border
    if border != k - 1:
        raise UserError(
            f"--from {str(folder)!r} holds the activations behind block {border}, which block {border + 1} reads, "
            f"and not block {k}"
        )
    if upstream and cache.digest != upstream["digest"]:
        raise UserError(f"--from {str(folder)!r} is not the cache on which {str(run.path)!r} was trained")
    return cache
