"""What must be the same when a run resumes, and which lines of its logs stay."""
import json
import math

from support import system
from support.system import BadInput

# Settings that do not change the result. (The data may have moved; it is known by its fingerprint,
# of captions and image names, or of the shards' names and sizes.)
MAY_CHANGE_ON_RESUME = {
    "recipe", "out", "data", "data_root", "valid_data", "features", "workers", "processes",
    "max_bad", "grad_checkpointing", "compile", "log_every", "save_every", "save_minutes", "keep",
    "patience", "average", "seen",
}
OFF = (None, False, 0, "", "none", "auto")                  # of a setting that no flag turns on


def check_settings(before, now, config, out, say):
    """Raise BadInput when a setting differs and changes the result; say a note for other masks.

    before, now: {name: value}. out: the run's folder.
    """
    # A process draws masks for each micro-batch, so another size or number draws other masks.
    masks = config.text_dropout > 0 or now["patch_dropout"] > 0
    names = differing(before, now, set() if masks else {"micro_batch"})
    titles = {"norm_batch": "BatchNorm over --micro-batch x processes =",
              "features_kept": "features kept (--features):"}
    changed = [f"{titles.get(name, name)} {before.get(name)}, now it is {now.get(name)}"
               for name in names]
    if changed:
        raise BadInput(f"{out} holds a run with {'; '.join(changed)}. Continue it with the same "
                       "settings, choose another --out, or start a new run from it: "
                       f"--init {out / 'last.pt'} --out {out}-2")
    if masks and before["processes"] != now["processes"]:
        say(f"note: {now['processes']} processes instead of {before['processes']} draw other "
            "dropout masks from here on; all else stays the same")


def differing(before, now, also_free=()):
    """Names of the settings that differ and may not.

    Another version may know more settings or fewer. One that is in `before` or `now` alone differs
    when it is on.
    """
    names = []
    for name in sorted((before.keys() | now.keys()) - MAY_CHANGE_ON_RESUME - set(also_free)):
        if name in before and name in now:
            differs = before[name] != now[name]
        else:
            differs = (before | now)[name] not in OFF
        if differs:
            names.append(name)
    return names


def keep_lines(path, step):
    """Cut a .jsonl log to its lines up to `step` -> those lines. Written anew for step 0."""
    lines = []
    if path.exists() and step:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        lines = [line for line in lines if logged_step(line) <= step]
    system.write_text(path, "".join(line + "\n" for line in lines))
    return lines


def logged_step(line):
    """The step of a line of metrics.jsonl or bad_samples.jsonl.

    Infinity for an average, which is tried again after a resume, and for any line that is not ours
    or was cut by a crash.
    """
    try:
        record = json.loads(line)
        ours = type(record["step"]) is int and type(record.get("pair", 0)) is int
        return record["step"] if ours and "average" not in record else math.inf
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return math.inf
