"""Broken recipes: each mistake is reported once, with its key, its line and what to do about it.

A case changes the sound recipe below. The line to blame carries the expected problem: `#! key | message | remedy`.
"""

from pathlib import Path

import pytest

from ftlaunch.errors import Problem, RecipeError
from ftlaunch.load import load_recipe
from ftlaunch.rules import find_problems

SOUND = """\
name = "demo"
seed = 1
[model]
path = "owner/model"
dtype = "bf16"
[adapter]
kind = "lora"
rank = 4
[data.qa]
path = "owner/rows"
prompt = "Q: {question}"
completion = "{answer[value]}"
[optimizer]
name = "adamw"
[parallel]
device = "cpu"
[[stage]]
kind = "sft"
data = "qa"
steps = 10
[[stage]]
kind = "merge"
"""

SEED, STEPS, RANK, DATA, DEVICE = "seed = 1", "steps = 10", "rank = 4", "[data.qa]", 'device = "cpu"'
PROMPT, COMPLETION = 'prompt = "Q: {question}"', 'completion = "{answer[value]}"'
SFT = '[[stage]]\nkind = "sft"\ndata = "qa"\nsteps = 10\n'
REWARD = '[[stage]]\nkind = "reward"\ndata = "qa"\nsteps = 10\n'
MERGE = '[[stage]]\nkind = "merge"\n'

UNKNOWN_KEYS = {
    "misspelt": (SEED, 'sed = 1 #! sed | not a known key | did you mean "seed"?'),
    "initials": (STEPS, 'steps = 10\nlr = 1e-4 #! stage[0].lr | not a known key | "learning_rate"'),
    "of a stage": (SEED, 'batch_size = 4 #! batch_size | belongs to [[stage]] of kind "sft" | move it to [[stage]]'),
    "of the model": (DATA, '[data.qa]\ndtype = "bf16" #! data.qa.dtype | it belongs to [model] | move it to [model]'),
    "of the optimizer": (STEPS, "steps = 10\neps = 1 #! stage[0].eps | it belongs to [optimizer] | move it"),
    "misspelt and elsewhere": (SEED, 'learning_rat = 1 #! learning_rat | not a known | "learning_rate", which belongs'),
    "like nothing": (RANK, "rank = 4\nzzz = 1 #! adapter.zzz | not a known key | knows kind, rank, alpha, dropout"),
    "hardly like one": (SEED, "lorat = 1 #! lorat | not a known key | knows name, model, stage"),
    "table": ("[optimizer]", '[optimiser] #! optimiser | not a known key | did you mean "optimizer"?'),
    "kind as a table": (
        "[optimizer]",
        '[lora] #! lora | not a known | write [adapter] with kind = "lora"\n[optimizer]',
    ),
    "of another kind": (
        '"lora"\nrank = 4',
        '"full"\nrank = 4 #! adapter.rank | belongs to kind "lora", "rslora" | kind = "lora"',
    ),
    "misspelt and needed": ('path = "owner/model"', 'pth = "owner/model" #! model.pth | not a known | mean "path"?'),
}

MISSING = {
    "key": ('[model]\npath = "owner/model"', "[model] #! model.path | is missing | add path = … to [model]"),
    "key of the top": ('name = "demo"', "#! name | is missing | add name = … to the top of the file"),
    "key of a stage": (
        '[[stage]]\nkind = "sft"\ndata = "qa"',
        '[[stage]]#! stage[0].data | missing | [[stage]]\nkind="sft"',
    ),
    "kind": ('[adapter]\nkind = "lora"', '[adapter] #! adapter.kind | expected "lora", "rslora" | write kind = "lora"'),
    "kind of a stage": (
        MERGE,
        '[[stage]] #! stage[1].kind | expected "sft", "reward", | write kind = "sft", "reward",',
    ),
    "table": (
        '[model]\npath = "owner/model"\ndtype = "bf16"',
        "",
        "name = ",
        "#! model | missing | headed [model]\nname = ",
    ),
    "stages": (SFT + MERGE, "", "name = ", "#! stage | is missing | add a table headed [[stage]]\nname = "),
}

WRONG_VALUES = {
    "text for a number": (STEPS, "steps = 'ten' #! stage[0].steps | a whole number above 0, got 'ten' | give it such"),
    "number in quotes": (STEPS, "steps = '10' #! stage[0].steps | got '10' | write steps = 10"),
    "whole number with a point": (RANK, "rank = 4.0 #! adapter.rank | a whole number | write rank = 4"),
    "text in quotes for true": (
        STEPS,
        "steps = 1\npacking = 'True' #! stage[0].packing | true or false | packing = true",
    ),
    "number for text": ('"demo"', '7 #! name | one word of letters, digits | write name = "7"'),
    "too small": (RANK, "rank = 0 #! adapter.rank | a whole number above 0, got 0 | leave it out for the default, 8"),
    "too large": (RANK, "dropout = 1.0 #! adapter.dropout | a number from 0 to below 1, got 1.0 | the default, 0.0"),
    "at a bound that is left out": (
        DATA,
        "[noise]\nkind = 'dropout'\nprobability = 1.0 #! noise.probability | above 0 and below 1, got 1.0 | 0.1\n"
        "[data.qa]",
    ),
    "above the most": (
        DATA,
        "[data.qa]\nunfit_share = 1.2 #! data.qa.unfit_share | a number from 0 to 1, got 1.2 | the default, 0.1",
    ),
    "nan": (RANK, "alpha = nan #! adapter.alpha | a number above 0, got nan | the default, 16"),
    "infinity": (RANK, "alpha = inf #! adapter.alpha | a number above 0, got inf | the default, 16"),
    "more than 64 bits": (SEED, "seed = 9223372036854775808 #! seed | a whole number from 0 up | the default, 42"),
    "true for a number": (SEED, "seed = true #! seed | a whole number from 0 up, got true | the default, 42"),
    "date": (SEED, "seed = 2024-01-02 #! seed | got the date or time 2024-01-02 | the default, 42"),
    "table for a number": (SEED, "seed = {} #! seed | got a table | the default, 42"),
    "misspelt word": (
        '"bf16"',
        '"bf61" #! model.dtype | "auto", "bf16", "fp16" or "fp32" | did you mean "bf16"?',
    ),
    "word in capitals": ('"bf16"', '"FP32" #! model.dtype | got \'FP32\' | did you mean "fp32"?'),
    "neither count nor share": (
        DATA,
        "[data.qa]\ntest = 1.5 #! data.qa.test | a whole number from 0 up or | default, 0",
    ),
    "too few": ('"adamw"', '"adamw"\nbetas = [0.9] #! optimizer.betas | a list of 2: a number | default, [0.9, 0.999]'),
    "wrong element": ('"qa"', '["qa", 3] #! stage[0].data | got a list with 3 | give it such a value'),
    "unknown kind": ('"sft"', '"stf" #! stage[0].kind | got \'stf\' | did you mean "sft"?'),
    "number for a table": (
        '[parallel]\ndevice = "cpu"',
        "",
        SEED,
        "parallel=2 #! parallel | a table, got 2 | write [parallel]",
    ),
    "kind for a table": (
        '[adapter]\nkind = "lora"\nrank = 4',
        "",
        SEED,
        'adapter="lora" #! adapter | a table | kind = "lora"',
    ),
    "one stage": (MERGE, "", "[[stage]]", "[stage] #! stage | tables headed [[stage]], got a table | headed [[stage]]"),
    "data without a name": (
        DATA + "\n",
        "[data]\n",
        '/rows"',
        '/rows" #! data.path | no name | head the table [data.NAME]',
    ),
    "odd name of data": (DATA, '[data."q a"] #! data."q a" | one word of letters | rename it', '"qa"', '"q"'),
    "name of two words": ('"demo"', '"my demo" #! name | one word of letters, digits | give it such a value'),
    "long name": ('"demo"', f'"{"a" * 65}" #! name | of at most 64 characters | give it such a value'),
    "escape in a name": ('"demo"', "\"de\\u001bmo\" #! name | control character '\\x1b' | remove that character"),
    "line break in a path": ("owner/rows", "a\\nb", '\\nb"', "\\nb\" #! data.qa.path | character '\\n' | remove that"),
    "delete in a template": ('{question}"', "\\u007f\" #! data.qa.prompt | control character '\\x7f' | remove that"),
}

PLACES = {
    "no such folder": (
        'owner/model"',
        './model" #! model.path | there is no {folder}/model | a folder with safetensors',
    ),
    "no such file": ('owner/rows"', 'rows.jsonl" #! data.qa.path | there is no {folder}/rows.jsonl | correct the path'),
    "deep path": ('owner/rows"', 'a/b/c" #! data.qa.path | there is no {folder}/a/b/c | correct the path'),
    "home": ('owner/rows"', '~/none/rows" #! data.qa.path | /none/rows | correct the path'),
    "odd hub id": ('owner/model"', 'own er/model" #! model.path | cannot be a hub id | correct the hub id'),
    "GGUF": ('owner/model"', 'm.gguf" #! model.path | is a GGUF file | `ftlaunch import m.gguf DIR`'),
    "a stage's GGUF": (STEPS, 'model={path="m.gguf"} #! stage[0].model.path | GGUF | `ftlaunch import m.gguf DIR`'),
    "template": (DATA, '[data.qa]\ntemplate = "chatlm" #! data.qa.template | no file {folder}/chatlm | mean "chatml"?'),
}

DATA_RULES = {
    "prompt alone": (COMPLETION, "", DATA, "[data.qa] #! data.qa.completion | is missing | add completion"),
    "completion alone": (PROMPT, "", DATA, "[data.qa] #! data.qa.prompt | is missing | add prompt"),
    "format and templates": (
        DATA,
        "[data.qa]\nformat='text' #! data.qa.format | has no use for prompt and | keep either",
    ),
    "half a brace": (PROMPT, "prompt = '{q' #! data.qa.prompt | is not a template | write {{ and }} for braces"),
    "no field name": (PROMPT, "prompt = '{}' #! data.qa.prompt | {}, which names no field | write the field's name"),
    "position": (PROMPT, "prompt = '{0}' #! data.qa.prompt | {0}, which names no field | write the field's name"),
    "attribute": (PROMPT, "prompt = '{q.x}' #! data.qa.prompt | neither {field} nor {field[key]} | write {field} or"),
    "conversion": (PROMPT, "prompt = '{q!r}' #! data.qa.prompt | has {q!r}, and a field takes no conversion | {field}"),
    "format of a field": (
        PROMPT,
        "prompt = '{q:>9}' #! data.qa.prompt | has {q:>9}, and a field takes | write {field}",
    ),
    "system template": (DATA, "[data.qa]\nsystem = '}' #! data.qa.system | is not a template | write {{ and }}"),
    "same answer": (COMPLETION, "completion = 'yes' #! data.qa.completion | has no field | name the row's field"),
    "assistant turns": (DATA, '[data.qa]\ntrain_on="assistant" #! data.qa.train_on | whole conversations | "answer"'),
    "text field": (DATA, '[data.qa]\ntext_field="text" #! data.qa.text_field | only for format "text" | remove it'),
    "turns field": (
        DATA,
        '[data.qa]\nmessages_field="x" #! data.qa.messages_field | only for | "messages" or "sharegpt"',
    ),
    "system of text": (
        f"{PROMPT}\n{COMPLETION}",
        "format='text'\nsystem='x' #! data.qa.system | has no place | remove it",
    ),
    "all held out": (DATA, "[data.qa]\nlimit = 5\ntest = 5 #! data.qa.test | leaves none to train on | below 5"),
    "share of a stream": (DATA, "[data.qa]\nstreaming=true\ntest=0.1 #! data.qa.test | 0.1 of a stream | test = 100"),
    "split of a file": (
        'owner/rows"',
        '{folder}/recipe.toml"\nsplit = "x" #! data.qa.split | {folder}/recipe.toml is on this machine | remove it',
    ),
    "chosen alone": (
        *(
            f'{DATA}\npath = "owner/rows"\n{PROMPT}\n{COMPLETION}',
            "[data.qa] #! data.qa.chosen | missing | add chosen\npath='o/b'\nrejected='{b}'",
        ),
        *('kind = "sft"', 'kind = "dpo"'),
    ),
    "ratings without a prompt": (
        f'{DATA}\npath = "owner/rows"\n{PROMPT}\n{COMPLETION}',
        "[data.qa] #! data.qa.prompt | \"ratings\" needs it | add prompt\nformat='ratings'\npath='owner/rows'",
        'kind = "sft"',
        'kind = "dpo"',
    ),
    "ratings of a pair": (
        *(
            f"{PROMPT}\n{COMPLETION}",
            "format='preference'\nrating_field='x' #! data.qa.rating_field | only for | remove",
        ),
        *('kind = "sft"', 'kind = "dpo"'),
    ),
    "trained prompt of a pair": (
        *(
            f"{PROMPT}\n{COMPLETION}",
            "format='preference'\ntrain_on='all' #! data.qa.train_on | no place in | remove it",
        ),
        *('kind = "sft"', 'kind = "dpo"'),
    ),
    "stream of pairs": (
        *(f"{PROMPT}\n{COMPLETION}", "format='preference'\nstreaming=true #! data.qa.streaming | before | remove it"),
        *('kind = "sft"', 'kind = "dpo"'),
    ),
    "unused": ("[optimizer]", "[data.b] #! data.b | not used by any | remove\npath='o/b'\nformat='text'\n[optimizer]"),
}

STAGE_RULES = {
    "unknown data": ('data = "qa"', 'data = ["qa", "qaa"] #! stage[0].data | no table [data.qaa] | did you mean "qa"?'),
    "data twice": ('data = "qa"', 'data = ["qa", "qa"] #! stage[0].data | names "qa" 2 times | data.qa.weight'),
    "epochs and steps": (STEPS, "epochs = 1\nsteps = 10 #! stage[0].steps | together with epochs | keep the one"),
    "uneven batch": (DEVICE, 'strategy="ddp"\nnodes=3', STEPS, "batch_size=7 #! stage[0].batch_size | 3 proc | 6 or 9"),
    "small batch": (
        DEVICE,
        'strategy="ddp"\nnodes=3',
        STEPS,
        "batch_size=2 #! stage[0].batch_size | over 3 | size = 3",
    ),
    "batch and micro-batch": (
        *(DEVICE, 'strategy="zero1"\nprocs_per_node=3'),
        *(STEPS, "micro_batch_size=2\nbatch_size=8 #! stage[0].batch_size | 8 rows | batch_size = 6 or 12"),
    ),
    "micro-batch": (STEPS, "micro_batch_size = 3 #! stage[0].micro_batch_size | micro-batches of 3 | 1, 2, 4 or 8"),
    "endless warm-up": (STEPS, "steps = 10\nwarmup = 10 #! stage[0].warmup | nothing of 10 steps | below 10, or a fra"),
    "stream without steps": (
        STEPS,
        "",
        DATA,
        DATA + "\nstreaming=true",
        '"sft"\n',
        '"sft"\nepochs=2 #! stage[0].epochs | not known | steps\n',
    ),
    "no rows to evaluate": (STEPS, "evaluate_every = 5 #! stage[0].evaluate_every | no rows | data.qa.test"),
    "no rows to score": (STEPS, 'eval_metrics = ["bleu"] #! stage[0].eval_metrics | no rows | data.qa.test'),
    "no metric of answers": (
        *(DATA, "[data.qa]\ntest = 4"),
        *(STEPS, 'eval_metrics = ["perplexity"] #! stage[0].eval_metrics | is of no answers | in an evaluate stage'),
    ),
    "a metric twice": (
        *(DATA, "[data.qa]\ntest = 4"),
        *(STEPS, 'eval_metrics = ["nist", "bleu", "nist"] #! stage[0].eval_metrics | names "nist" 2 times | once'),
    ),
    "answers of every turn": (
        *(DATA, '[data.qa]\ntest = 4\nformat = "messages"\ntrain_on = "assistant"', f"{PROMPT}\n{COMPLETION}\n", ""),
        *(STEPS, 'eval_metrics = ["bleu"] #! stage[0].eval_metrics | only last answers | in an evaluate stage'),
    ),
    "answers of a stream": (
        *(DATA, "[data.qa]\ntest = 4\nstreaming = true"),
        *(STEPS, 'steps = 10\neval_metrics = ["bleu"] #! stage[0].eval_metrics | is streamed | another table'),
    ),
    "beams of drawn answers": (
        *(DATA, "[data.qa]\ntest = 4"),
        *(
            STEPS,
            'eval_metrics = ["bleu"]\neval_temperature = 1.0\neval_beams = 2 #! stage[0].eval_beams | draws | remove',
        ),
    ),
    "a limit without answers": (STEPS, "eval_prompts = 4 #! stage[0].eval_prompts | only with eval_metrics | remove"),
    "no score": (
        *(DATA, "[data.qa]\ntest = 4"),
        *(STEPS, 'evaluate_every = 2\nbest_by = "rougeL" #! stage[0].best_by | no score of | add "rouge" to eval_metr'),
    ),
    "the best of one": (
        *(DATA, "[data.qa]\ntest = 4"),
        *(STEPS, 'best_by = "perplexity" #! stage[0].best_by | the only one is at the end | evaluate_every'),
    ),
    "answers of a reward model": (
        *(DATA, '[data.qa]\ntest = 4\nformat = "preference"', f"{PROMPT}\n{COMPLETION}\n", ""),
        *(
            SFT,
            REWARD.replace("steps", 'eval_metrics = ["bleu"] #! stage[0].eval_metrics | gives none | remove it\nsteps'),
        ),
        *(MERGE, ""),
    ),
    "two alone": (DEVICE, 'strategy="single" #! parallel.strategy | procs_per_node is 2 | "ddp"\nprocs_per_node=2'),
    "two nodes alone": (STEPS, 'parallel={nodes=2} #! stage[0].parallel.strategy | procs_per_node is 2 | "ddp"'),
    "offload alone": (
        DEVICE,
        'offload = "cpu" #! parallel.offload | only ZeRO can offload | "zero1", "zero2" or "zero3"',
    ),
    "quantized and full": (
        *('"lora"\nrank = 4', '"full"', MERGE, ""),
        *('"bf16"', '"bf16"\nquantization = "nf4" #! model.quantization | "nf4" weights cannot | add [adapter]'),
    ),
    "learned around nothing": (
        '"bf16"',
        '"bf16"\nquantization={kind="qat",learned_step=true,symmetric=false} #! model.quantization | around 0 | remove',
    ),
    "rounded in shards": (
        *(DEVICE, 'strategy = "zero3"'),
        *('"bf16"', '"bf16"\nquantization = {kind="bitlinear"} #! model.quantization | whole weights | "zero2"'),
    ),
    "rounded and dropped": (
        *('"bf16"', '"bf16"\nquantization = {kind="qat"}'),
        *(RANK, "rank = 4\ndropout = 0.1 #! adapter.dropout | as one weight | dropout = 0"),
    ),
    "rounded twice": (
        *('"bf16"', '"bf16"\nquantization = {kind="bitlinear"} #! model.quantization | rounded already | same adapter'),
        *('"lora"\nrank = 4', '"full"', MERGE, SFT),
    ),
    "rounded rewards": (
        *('"bf16"', '"bf16"\nquantization = {kind="qat"} #! model.quantization | kind "reward" | remove it'),
        *('prompt = "Q: {question}"\ncompletion = "{answer[value]}"', 'format = "preference"', SFT, REWARD),
    ),
    "no such rounding": (
        *('"bf16"', '"bf16"\nquantization = {kind="qad"} #! model.quantization.kind | "qat" or "bitlinear" | "qat"'),
    ),
    "no such format": (
        '"bf16"',
        '"bf16"\nquantization = "nf5" #! model.quantization | or a table | did you mean "nf4"',
    ),
    "quantized and offload": (
        *('"bf16"', '"bf16"\nquantization = "nf4"'),
        *(DEVICE, 'strategy = "zero3"\noffload = "cpu" #! parallel.offload | host memory | remove offload or'),
    ),
    "8 bits and ZeRO": (
        DEVICE,
        'strategy="zero2"',
        '"adamw"',
        '"adamw_8bit" #! optimizer.name | plain AdamW | "adamw"',
    ),
    "paged on a CPU": ('"adamw"', '"paged_adamw" #! optimizer.name | needs a GPU | write name = "adamw"'),
    "paged 8 bits on a CPU": (
        '"adamw"',
        '"paged_adamw_8bit" #! optimizer.name | needs a GPU | write name = "adamw_8bit"',
    ),
    "fp16 on a CPU": ('"bf16"', '"fp16" #! model.dtype | needs a GPU | write dtype = "bf16" or "fp32"'),
    "targets": (RANK, "targets = '(q|v' #! adapter.targets | is not a regular expression | \"all-linear\""),
    "layers of no form": (
        *(RANK, 'layers = "bottom:2" #! adapter.layers | "super-weights", "top:8" or "every:4" | give it such a value'),
    ),
    "no layers": (RANK, "layers = [] #! adapter.layers | names no layer | which adapts all layers"),
    "LoRA+ without B": (
        *('"lora"\nrank = 4', '"full"', MERGE, ""),
        '"adamw"',
        '"adamw"\nlora_plus_ratio = 16 #! optimizer.lora_plus_ratio | kind = "full" has none | kind = "lora"',
    ),
    "a ratio below 1": ('"adamw"', '"adamw"\nlora_plus_ratio = 0.5 #! optimizer.lora_plus_ratio | from 1 up | leave'),
    "ranks that rise": (
        *('"lora"\nrank = 4', '"adalora"\nrank = 4\ninitial_rank = 2 #! adapter.initial_rank | less than rank | larg'),
    ),
    "pruning that never begins": (
        *('"lora"\n', '"adalora"\nprune_until = 0.05 #! adapter.prune_until | no later than prune_after | larg\n'),
    ),
    "AdaLoRA in fp16": (
        *('"lora"', '"adalora"', DEVICE, "", '"bf16"', '"fp16" #! model.dtype | compares gradients | dtype = "bf16"'),
    ),
    "virtual tokens in packed rows": (
        *('"lora"\nrank = 4', '"prompt"', MERGE, ""),
        *('"sft"\n', '"sft"\npacking = true #! stage[0].packing | laid end to end | packing = false\n'),
    ),
    "virtual tokens merged": (
        *('"lora"\nrank = 4', '"p_tuning"', '"sft"\n', '"sft"\npacking = false\n'),
        *(MERGE, '[[stage]] #! stage[1] | no part of any weight | ship base and adapter\nkind = "merge"'),
    ),
    "virtual tokens merged on the way": (
        *('"lora"\nrank = 4', '"prompt"', '"sft"\n', '"sft"\npacking = false\n'),
        *(MERGE, SFT + 'adapter.kind = "lora" #! stage[1].adapter | cannot be merged | the same adapter'),
    ),
    "a prefix computed again": (
        *('"lora"\nrank = 4', '"prefix"', MERGE, "", '"sft"\n', '"sft"\npacking = false\n'),
        *(STEPS, "steps=10\nactivation_checkpointing=true #! stage[0].activation_checkpointing | only once | prompt"),
    ),
    "an LSTM under ZeRO": (
        *('"lora"\nrank = 4', '"p_tuning"\nencoder = "lstm" #! adapter.encoder | DeepSpeed | encoder = "mlp"'),
        *(MERGE, "", '"sft"\n', '"sft"\npacking = false\n', DEVICE, 'strategy = "zero2"'),
    ),
    "an init without its text": (
        *('"lora"\nrank = 4', '"prompt"\ninit = "text" #! adapter.init | there is none | add text'),
        *(MERGE, "", '"sft"\n', '"sft"\npacking = false\n'),
    ),
    "a text without its init": (
        *('"lora"\nrank = 4', '"prompt"\ntext = "Hi" #! adapter.text | only for init = "text" | remove it'),
        *(MERGE, "", '"sft"\n', '"sft"\npacking = false\n'),
    ),
    "noise after virtual tokens": (
        *('"lora"\nrank = 4', '"prompt"\n[noise]\nkind = "gaussian" #! noise.kind | virtual ones | remove [noise]'),
        *(MERGE, "", '"sft"\n', '"sft"\npacking = false\n'),
    ),
    "virtual tokens of a reward model": (
        *(
            '"lora"\nrank = 4',
            '"prompt" #! adapter.kind | puts tokens before them | kind = "lora" for this stage',
            MERGE,
            "",
        ),
        *(f"{PROMPT}\n{COMPLETION}", "format = 'preference'", '"sft"\n', '"reward"\n'),
    ),
    "a key of another adapter": (
        *(RANK, 'svd_iterations = 4 #! adapter.svd_iterations | belongs to kind "pissa" | write kind = "pissa"'),
    ),
    "no targets": (RANK, 'targets = [] #! adapter.targets | names no module | targets = "all-linear"'),
    "another base": (MERGE, SFT + 'model={path="o/b"} #! stage[1].model.path | another model | path = "owner/model"'),
    "a start that is not there": (
        MERGE,
        SFT
        + 'start = "dpo" #! stage[1].start | "dpo" is none of the earlier training stages | name one by its place: 0',
    ),
    "pairs in SFT": (
        *(f"{PROMPT}\n{COMPLETION}", "format = 'preference'"),
        *('data = "qa"', 'data = "qa" #! stage[0].data | "sft" cannot train on [data.qa] | with another format'),
    ),
    "no pairs in DPO": (
        *('"sft"\ndata = "qa"', '"dpo"\ndata = "qa" #! stage[0].data | format "prompt" | "preference" or "ratings"'),
    ),
    "padded and shared": (
        *(f"{PROMPT}\n{COMPLETION}", "format = 'preference'"),
        *('"sft"\n', '"orpo"\npacking = false #! stage[0].packing | padded | write share_prompt = false\n'),
    ),
    "live reference of all weights": (
        *(f"{PROMPT}\n{COMPLETION}", "format = 'preference'", '"lora"\nrank = 4', '"full"', MERGE, ""),
        *('"sft"\n', '"dpo"\nreference = "live" #! stage[0].reference | needs an adapter | "precomputed"\n'),
    ),
    "smoothed hinge": (
        *(f"{PROMPT}\n{COMPLETION}", "format = 'preference'"),
        *(
            '"sft"\n',
            '"dpo"\nlabel_smoothing = 0.1 #! stage[0].label_smoothing | "hinge" | remove it\nloss = "hinge"\n',
        ),
    ),
    "policy after a reward model": (
        *(f"{PROMPT}\n{COMPLETION}", "format = 'preference'", '"sft"', '"reward"'),
        *(MERGE, '[[stage]]\nkind = "orpo" #! stage[1].kind | makes a reward model | before the reward\ndata = "qa"\n'),
    ),
    "no reward": (
        *(SFT, '[[stage]] #! stage[0].reward_function | is missing | kind = "reward" before\nkind="ppo"\ndata="qa"\n'),
    ),
    "two rewards": (
        '"sft"\n',
        '"ppo"\nreward_function = "gsm8k"\nreward_model = "a/b" #! stage[0].reward_model | together | keep the one\n',
    ),
    "a revision of a reward model on this machine": (
        '"sft"\n',
        '"ppo"\nreward_function="gsm8k"\nreward_revision = "v1" #! stage[0].reward_revision | of the hub | remove it\n',
    ),
    "a reward stage for nothing": (
        *(SFT, ""),
        *(DATA, '[data.pairs]\nformat="preference"\npath="owner/pairs"\n[data.qa]'),
        *(
            MERGE,
            '[[stage]]\nkind="reward"\ndata="pairs"\n[[stage]]\nkind="ppo"\ndata="qa"\n'
            'reward_function="gsm8k" #! stage[1].reward_function | so is a reward stage before it | keep the one\n',
        ),
    ),
    "no such shipped reward": (
        '"sft"\n',
        '"ppo"\nreward_function = "gsm8" #! stage[0].reward_function | is no function | did you mean "gsm8k"?\n',
    ),
    "no such module": (
        '"sft"\n',
        '"ppo"\nreward_function = "json.x:f" #! stage[0].reward_function | no module "json.x" | install it\n',
    ),
    "no such function": (
        '"sft"\n',
        '"ppo"\nreward_function = "json:dump_all" #! stage[0].reward_function | has no function | mean "dump"?\n',
    ),
    "no such file of rewards": (
        '"sft"\n',
        '"ppo"\nreward_function = "r.py:f" #! stage[0].reward_function | there is no | FILE.py:NAME\n',
    ),
    "a rollout in parts": (
        '"sft"\n',
        '"ppo"\nreward_function = "gsm8k"\nrollout_size = 12 #! stage[0].rollout_size | mini-batches of 8 | 8 or 16\n',
    ),
    "a horizon without a target": (
        '"sft"\n',
        '"ppo"\nreward_function = "gsm8k"\nkl_horizon = 12 #! stage[0].kl_horizon | no kl_target | remove it\n',
    ),
    "vLLM for what it cannot serve": (
        *('kind = "lora"', 'kind = "dora"'),
        *(DEVICE, 'device = "cuda"'),
        '"sft"\n',
        '"ppo"\nreward_function = "gsm8k"\n'
        'rollout_engine = "vllm" #! stage[0].rollout_engine | plain LoRA adapters | remove it\n',
    ),
    "a share of memory for nobody": (
        '"sft"\n',
        '"ppo"\nreward_function = "gsm8k"\nvllm_memory = 0.5 #! stage[0].vllm_memory | does not answer | add rollout\n',
    ),
    "text to be answered": (
        *(f"{PROMPT}\n{COMPLETION}", "format = 'text'"),
        *('"sft"\ndata = "qa"', '"ppo"\nreward_function = "gsm8k"\ndata = "qa" #! stage[0].data | have none | prompts'),
    ),
    "streamed prompts": (
        *(PROMPT, PROMPT + "\nstreaming = true #! data.qa.streaming | before the first step | remove it"),
        *('"sft"\n', '"ppo"\nreward_function = "gsm8k"\n'),
    ),
    "merge alone": (
        *(f'{DATA}\npath = "owner/rows"\n{PROMPT}\n{COMPLETION}\n', ""),
        *(SFT + "[[stage]]", '[[stage]] #! stage[0] | no stage comes before it | kind = "sft" before it'),
    ),
    "no data at all": (
        *(f'{DATA}\npath = "owner/rows"\n{PROMPT}\n{COMPLETION}\n', ""),
        *('data = "qa"', "data = [] #! stage[0].data | names no data | add a [data.NAME] table"),
    ),
    "merge of a full model": (
        *('"lora"\nrank = 4', '"full"'),
        *(
            '[[stage]]\nkind = "merge"',
            '[[stage]] #! stage[1] | the artifact is the model already | remove\nkind="merge"',
        ),
    ),
}

GROUPS = {
    "unknown key": UNKNOWN_KEYS,
    "missing": MISSING,
    "wrong value": WRONG_VALUES,
    "place": PLACES,
    "data": DATA_RULES,
    "stage": STAGE_RULES,
}
CASES = [pytest.param(edits, id=f"{group}: {name}") for group, cases in GROUPS.items() for name, edits in cases.items()]


def edited(edits: tuple[str, ...], folder: Path) -> str:
    text = SOUND
    for old, new in zip(edits[::2], edits[1::2], strict=True):
        assert old in text, old
        text = text.replace(old, new, 1)
    return text.replace("{folder}", str(folder))


def expected(text: str, path: Path) -> list[tuple[str, str, str, str]]:
    marks = [(number, line.split("#!")[1]) for number, line in enumerate(text.splitlines(), 1) if "#!" in line]
    return [(f"{path}:{number}", *(part.strip() for part in mark.split("|"))) for number, mark in marks]


def problems_of(path: Path) -> list[Problem]:
    try:
        loaded = load_recipe(path)
        return [*loaded.misplaced, *find_problems(loaded)]
    except RecipeError as error:
        return list(error.problems)


def test_the_sound_recipe_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(SOUND)
    assert problems_of(path) == []


@pytest.mark.parametrize("edits", CASES)
def test_a_mistake_is_reported_once_with_key_line_and_remedy(edits: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text := edited(edits, tmp_path))
    problems = problems_of(path)
    [(where, key, message, remedy)] = expected(text, path)
    assert [(problem.where, problem.key) for problem in problems] == [(where, key)], problems
    assert message in problems[0].message
    assert remedy in problems[0].remedy
    shown = str(problems[0])
    assert shown.startswith(f"{where}: {key}: ")
    assert remedy in shown


def test_all_mistakes_of_the_keys_are_reported_at_once(tmp_path: Path) -> None:
    groups = [UNKNOWN_KEYS["misspelt"], WRONG_VALUES["misspelt word"], PLACES["no such file"], WRONG_VALUES["nan"]]
    path = tmp_path / "recipe.toml"
    path.write_text(text := edited(tuple(edit for edits in groups for edit in edits), tmp_path))
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    wanted = expected(text, path)
    assert {(problem.where, problem.key) for problem in caught.value.problems} == {mark[:2] for mark in wanted}
    assert all(where in str(caught.value) and remedy in str(caught.value) for where, _, _, remedy in wanted)
    assert str(caught.value).startswith("4 problems\n")


def test_all_broken_rules_are_reported_at_once(tmp_path: Path) -> None:
    groups = [STAGE_RULES["endless warm-up"], DATA_RULES["all held out"], STAGE_RULES["fp16 on a CPU"]]
    path = tmp_path / "recipe.toml"
    path.write_text(text := edited(tuple(edit for edits in groups for edit in edits), tmp_path))
    assert {(problem.where, problem.key) for problem in problems_of(path)} == {
        mark[:2] for mark in expected(text, path)
    }
