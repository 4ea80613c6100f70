"""Random calls of the operators, each made from a valid one by up to three changes."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, field
from typing import Any

import fuzz_arguments as change
import process_settings  # noqa: F401  (threads, and the kernels that EFLAT_TEST_KERNELS names)
import torch
from adamw_case import NUMBERS as ADAMW_NUMBERS
from adamw_case import random_call
from strategies import ADDED, DTYPES, make_pair
from torch import Tensor

import eflat_ext

TWO_PER_PAIR = ("exp_avg", "exp_avg_sq", "step", *ADAMW_NUMBERS)
TWO_ONTO_BOTH = ("E", "ema")


def two_per_pair(arguments: dict[str, Any]) -> tuple[str, ...]:
    """Return the names of lists with an entry for each A, then one for each B."""
    both = arguments.get("onto") == "both"
    return TWO_PER_PAIR + TWO_ONTO_BOTH if both else TWO_PER_PAIR


def schemas() -> dict[str, Any]:
    """Return the schema of every operator of torch.ops.eflat."""
    found = (s for s in torch._C._jit_get_all_schemas() if s.name.startswith("eflat::"))
    return {schema.name.removeprefix("eflat::"): schema for schema in found}


SCHEMAS = schemas()
TYPES = {name: {a.name: str(a.type) for a in s.arguments} for name, s in SCHEMAS.items()}
WRITTEN = {
    name: [a.name for a in s.arguments if a.alias_info and a.alias_info.is_write]
    for name, s in SCHEMAS.items()
}
PUBLIC = ("perturb", "foreach_perturb")


@dataclass
class Call:
    operator: str
    public: bool
    arguments: dict[str, Any]
    mode: str = "grad"
    changes: list[str] = field(default_factory=list)
    unsure: bool = False

    @property
    def types(self) -> dict[str, str]:
        return TYPES[self.operator]

    @property
    def written(self) -> list[str]:
        return WRITTEN[self.operator]

    def __str__(self) -> str:
        arguments = ", ".join(f"{k}={short(v)}" for k, v in self.arguments.items())
        name = f"eflat_ext.{self.operator}" if self.public else f"torch.ops.eflat.{self.operator}"
        return f"{name}({arguments}) in mode {self.mode}, changed: {'; '.join(self.changes)}"

    def run(self) -> Any:
        function = getattr(eflat_ext if self.public else torch.ops.eflat, self.operator)
        modes = {
            "grad": contextlib.nullcontext,
            "no_grad": torch.no_grad,
            "inference": torch.inference_mode,
        }
        with modes[self.mode]():
            return function(**self.arguments)


def short(value: Any) -> str:
    if isinstance(value, Tensor):
        try:
            shape: Any = tuple(value.shape)
        except RuntimeError:
            shape = "nested"
        text = f"<{str(value.dtype)[6:]} {shape}"
        if value.layout == torch.strided and not value.is_nested:
            text += f" strides {value.stride()} at {value.storage_offset()}"
        return f"{text} {value.layout} {value.device}{' grad' * value.requires_grad}>"
    if isinstance(value, (list, tuple)):
        more = f", ... {len(value)} in all" if len(value) > 6 else ""
        return f"[{', '.join(map(short, value[:6]))}{more}]"
    return repr(value[:60] if isinstance(value, (str, bytes)) else value)[:60]


# Kinds of tensors.


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [t for x in value for t in tensors_of(x)]
    return []


def is_fake(t: Tensor) -> bool:
    return isinstance(t, torch._subclasses.FakeTensor)


def usable(t: Any) -> bool:
    """Return whether the kernels can read a tensor at all."""
    return (
        isinstance(t, Tensor)
        and t.layout == torch.strided
        and not t.is_nested
        and not t.is_quantized
        and t.device.type == "cpu"
        and not is_fake(t)
        and in_storage(t)
    )


def in_storage(t: Tensor) -> bool:
    if t.numel() == 0:
        return True
    last = t.storage_offset() + sum(s * (n - 1) for s, n in zip(t.stride(), t.shape, strict=True))
    return (last + 1) * t.element_size() <= t.untyped_storage().nbytes()


def virtual(call: Call) -> bool:
    """Return whether a tensor of the call has no memory: fake kernels run then."""
    tensors = tensors_of(list(call.arguments.values()))
    return any(t.device.type == "meta" or is_fake(t) for t in tensors)


# Making calls.


def valid_call(rng: random.Random) -> Call:
    operator = rng.choice(sorted(SCHEMAS))
    public = operator in PUBLIC and rng.random() < 0.5
    count = rng.choice([0, 1, 1, 2, 2, 3, 5])
    dtype = rng.choice(DTYPES)
    onto = rng.choice("AB" if operator == "perturb" else ("A", "B", "both"))

    def size() -> int:
        return rng.choice([rng.randint(1, 12), rng.randint(1, 12), 33, 65, 300])

    pairs = [
        make_pair(
            *(rng.getrandbits(32), size(), size(), rng.choice([1, 2, 3, 4, 8, 17])),
            *(dtype, 10.0 ** rng.random(), 10.0 ** rng.random()),
            *(rng.choice([1.0, 2.0, -0.5]), rng.random() < 0.5),
        )
        for _ in range(max(count, 1))
    ]
    if operator == "foreach_bound":
        onto = "A"  # the moving averages that it is for
    options = (rng.choice(["layer", "global"]), rng.getrandbits(32), rng.choice(ADDED))
    values = random_call(pairs, onto, *options)
    values["rho"] = rng.choice([0.05, 0.0, 1.0, 3])
    values["beta"] = rng.choice([0.9, 0.0, 1.0, 0.3])
    values["rtol"] = rng.choice([None, None, 1e-7, 1e-3, 0.3])
    arguments = {}
    for argument in SCHEMAS[operator].arguments:
        value = values[argument.name]  # KeyError: an argument that this file does not know yet
        if isinstance(value, list):
            single = str(argument.type) in ("Tensor", "float")
            value = value[0] if single else value if count else []
        if not (argument.has_default_value() and rng.random() < 0.2 and argument.name != "onto"):
            arguments[argument.name] = value
    mode = rng.choices(["grad", "no_grad", "inference"], [6, 2, 1])[0]
    return Call(operator, public, arguments, mode)


def changed_tensor(rng: random.Random, call: Call, name: str, t: Any) -> Any:
    if not isinstance(t, Tensor) or rng.random() < 0.1:
        call.changes.append(f"{name}: no tensor")
        return change.no_tensor(rng)
    if rng.random() < 0.1:
        return shared(rng, call, name, t)
    function = rng.choice(change.CHANGES)
    if function is change.read_only and name.partition("[")[0] in call.written:
        function = change.flagged_read_only  # the other would end torch's own operators, too
    if function is change.bad_storage and (call.changes or no_pairs(call)):
        return t  # of no pairs nothing is read
    try:
        new = function(rng, t)
    except (RuntimeError, TypeError, ValueError, AssertionError):
        return t  # that cannot be had of such a tensor
    call.changes.append(f"{name}: {function.__name__}")
    # Without pairs the counter is the only tensor: with it on meta, the call is traced.
    call.unsure |= function in change.UNSURE or (function is change.other_device and no_pairs(call))
    return new


def shared(rng: random.Random, call: Call, name: str, t: Tensor) -> Tensor:
    """Return another argument, or a view of its memory with the shape of this one."""
    others = [
        x
        for value in call.arguments.values()
        for x in (value if isinstance(value, list) else [value])
        if isinstance(x, Tensor) and x is not t and usable(x)
    ]
    if not others:
        return t
    call.changes.append(f"{name}: shared memory")
    other = rng.choice(others)
    if rng.random() < 0.5 or other.dtype != t.dtype or other.numel() < t.numel():
        return other
    at = rng.randint(0, other.numel() - t.numel())
    return other.detach().reshape(-1)[at : at + t.numel()].view(t.shape)


def changed_number(rng: random.Random, call: Call, name: str) -> Any:
    value, unsure = change.number(rng)
    call.changes.append(f"{name}: {str(value)[:20]!r}")
    call.unsure |= unsure
    return value


def changed_list(rng: random.Random, call: Call, name: str, values: Any, numbers: bool) -> Any:
    if not isinstance(values, list) or rng.random() < 0.08:
        call.changes.append(f"{name}: no list")
        given = list(values) if isinstance(values, (list, tuple)) else [values]
        call.unsure = True  # torch takes some sequences
        return change.no_list(rng, given)
    values = list(values)
    if not values or rng.random() < 0.15:
        kind = rng.randrange(4)
        call.changes.append(f"{name}: entries {('less', 'more', 'none', 'many')[kind]}")
        if kind == 0:
            return values[:-1]
        if kind == 1:
            extra = 1.0 if numbers else torch.ones(3, 4)
            return [*values, values[-1] if values else extra]
        return [] if kind == 2 else values * (rng.choice([2, 50, 300]) if len(values) < 11 else 2)
    at = rng.randrange(len(values))
    one = f"{name}[{at}]"
    if numbers:
        values[at] = changed_number(rng, call, one)
    else:
        values[at] = changed_tensor(rng, call, one, values[at])
    return tuple(values) if rng.random() < 0.1 else values


def no_pairs(call: Call) -> bool:
    pairs = call.arguments.get("A")
    return isinstance(pairs, (list, tuple)) and not pairs


def every_tensor(call: Call, function: Any) -> None:
    for name, value in call.arguments.items():
        if isinstance(value, Tensor):
            call.arguments[name] = function(value)
        elif isinstance(value, (list, tuple)):
            call.arguments[name] = [function(x) if isinstance(x, Tensor) else x for x in value]


def change_all(rng: random.Random, call: Call) -> None:
    """Change the whole call: all tensors elsewhere, arguments missing, surplus, swapped."""
    kind = rng.randrange(8)
    names = sorted(call.arguments)
    call.changes.append(f"whole call, kind {kind}")
    if kind == 0:
        call.unsure = True  # the fake kernels may leave some checks to the real ones
        every_tensor(call, lambda t: t.to("meta"))
    elif kind == 1:
        mode = change.FakeTensorMode()
        call.unsure = True
        every_tensor(call, mode.from_tensor)
    elif kind == 2:
        dtype = rng.choice(change.DTYPES)
        every_tensor(call, lambda t: t.to(dtype) if t.is_floating_point() and t.dim() else t)
    elif kind == 3:
        del call.arguments[rng.choice(names)]
    elif kind == 4:
        call.arguments[rng.choice(["foo", "a", "self"])] = 1.0
    elif kind == 5:
        one, other = rng.sample(names, 2)
        values = call.arguments
        values[one], values[other] = values[other], values[one]
    elif kind == 6:
        every_tensor(call, lambda t: t.clone().requires_grad_(t.is_floating_point()))
    else:  # many pairs
        copies = rng.choice([10, 10, 50])
        doubled = two_per_pair(call.arguments)
        for name, value in call.arguments.items():
            if isinstance(value, list):
                parts = len(value) if name not in doubled else len(value) // 2
                if name in doubled:  # all A, then all B
                    value = value[:parts] * copies + value[parts:] * copies
                else:
                    value = value * copies
                clone = name in call.written
                value = [x.clone() if clone and isinstance(x, Tensor) else x for x in value]
                call.arguments[name] = value


def make_call(seed: int, number: int) -> Call:
    rng = random.Random(f"{seed} {number}")
    call = valid_call(rng)
    if number % 20 == 0:
        return call  # some are to be right
    for _ in range(rng.choice([1, 1, 2, 3])):
        names = sorted(call.arguments)
        if not names or rng.random() < 0.12:
            with contextlib.suppress(RuntimeError, AssertionError):  # no such fake or meta tensors
                change_all(rng, call)
            continue
        name = rng.choice(names)
        value, kind = call.arguments[name], call.types.get(name, "")
        if kind.startswith("List["):
            value = changed_list(rng, call, name, value, kind == "List[float]")
        elif kind == "Tensor":
            value = changed_tensor(rng, call, name, value)
        elif kind == "str":
            value = "both" if rng.random() < 0.1 else change.string(rng)
            call.changes.append(f"{name}: {str(value)[:10]!r}")
        else:
            value = changed_number(rng, call, name)
        call.arguments[name] = value
        if call.changes and call.changes[-1].endswith("bad_storage"):
            break  # torch itself would read what is not there, for an error of its own, say
    return call
