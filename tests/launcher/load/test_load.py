"""Reading a recipe: layers and their order, `--set`, paths, and where each value came from."""

from copy import deepcopy
from pathlib import Path

import pytest

from ftlaunch.errors import Problem, RecipeError
from ftlaunch.load import Loaded, layers, load_recipe, paths
from ftlaunch.load.origins import Source, SourceMap
from ftlaunch.recipe.adapter import Full, Lora
from ftlaunch.recipe.recipe import Recipe
from ftlaunch.recipe.stages import Merge, Sft
from ftlaunch.recipe.types import DataName, Kind, ModelName, Table, TemplateName

SMALL = """\
name = "small"
model.path = "owner/model"

[adapter]
kind = "lora"
rank = 4

[data.qa]
path = "owner/rows"
format = "text"

[[stage]]
kind = "sft"
data = "qa"

[[stage]]
kind = "merge"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for recipes, which is not the working directory."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "recipes"


def load(folder: Path, text: str = SMALL, *overrides: str) -> Loaded:
    path = folder / "recipe.toml"
    path.write_text(text)
    loaded = load_recipe(path, overrides)
    if loaded.misplaced:
        raise RecipeError(loaded.misplaced)
    return loaded


def problems(folder: Path, text: str, *overrides: str) -> tuple[Problem, ...]:
    with pytest.raises(RecipeError) as caught:
        load(folder, text, *overrides)
    return caught.value.problems


def sft(loaded: Loaded) -> Sft:
    stage = loaded.recipe.stage[0]
    assert isinstance(stage, Sft)
    return stage


def test_a_recipe_is_read_with_defaults_where_it_is_silent(folder: Path) -> None:
    loaded = load(folder)
    assert loaded.recipe.adapter == Lora(rank=4)
    assert loaded.recipe.seed == 42
    assert isinstance(loaded.recipe.stage[1], Merge)
    assert loaded.text == SMALL
    assert loaded.source == folder / "recipe.toml"


def test_the_text_is_kept_as_written(folder: Path) -> None:
    path = folder / "windows.toml"
    path.write_bytes(SMALL.replace("\n", "\r\n").encode())
    loaded = load_recipe(path)
    assert loaded.text == SMALL.replace("\n", "\r\n")
    assert loaded.where(("adapter", "rank")) == f"{path}:6"


def test_a_byte_order_mark_is_no_mistake(folder: Path) -> None:
    path = folder / "notepad.toml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.encode())
    assert load_recipe(path).recipe.name == "small"


def test_a_layer_is_not_changed_by_what_is_laid_over_it(folder: Path) -> None:
    (folder / "rows.jsonl").touch()
    layer = layers.parse(SMALL.replace("owner/rows", "rows.jsonl"), folder / "recipe.toml")
    before = deepcopy(layer)
    changed, _ = layers.override(layer, ["adapter.rank=2", "seed=1"])
    settled = paths.settle(Recipe, layer.values, SourceMap(Source("", folder), {}), set())
    assert layer == before
    assert changed.values != before.values != settled.values


def test_where_tells_the_line_of_a_key_or_of_the_table_around_it(folder: Path) -> None:
    loaded = load(folder)
    path = folder / "recipe.toml"
    assert loaded.where(("adapter", "rank")) == f"{path}:6"
    assert loaded.where(("adapter", "alpha")) == f"{path}:4"
    assert loaded.where(("stage", 1, "dtype")) == f"{path}:16"
    assert loaded.where(("parallel", "nodes")) == f"{path}:1"
    assert loaded.where.given(("adapter", "rank"))
    assert not loaded.where.given(("adapter", "alpha"))


@pytest.mark.parametrize(
    ("text", "line", "message", "remedy"),
    [
        ("a = 1\nb = word\n", 2, "invalid value", "put text in quotes"),
        ("a = 1\n\na = 2\n", 3, "cannot overwrite a value", "given twice"),
        ("[a]\n[b]\n[a]\n", 3, "cannot declare ('a',) twice", "join the two"),
        ("a = 1\nmy key = 2\n", 2, "expected '='", "in quotes"),
        ("a = [1,\n2\n", 3, "unclosed array", "https://toml.io"),
        (f"a = {'9' * 5000}", 1, "exceeds the limit", "https://toml.io"),
    ],
)
def test_a_slip_of_toml_is_told_with_its_line(folder: Path, text: str, line: int, message: str, remedy: str) -> None:
    [problem] = problems(folder, text)
    assert problem.where == f"{folder}/recipe.toml:{line}"
    assert "not valid TOML" in problem.message
    assert message in problem.message.lower()
    assert remedy in problem.remedy


def test_a_file_that_cannot_be_read_is_a_problem(folder: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        load_recipe(folder / "none.toml")
    with pytest.raises(RecipeError, match="is a directory"):
        load_recipe(folder)
    (folder / "latin.toml").write_bytes('name = "é"'.encode("latin-1"))
    with pytest.raises(RecipeError, match="not UTF-8 text: byte 9 is 0xe9"):
        load_recipe(folder / "latin.toml")


class TestExtends:
    def base(self, folder: Path, text: str) -> Path:
        path = folder / "base" / "base.toml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    def test_tables_merge_key_by_key_and_the_recipe_wins(self, folder: Path) -> None:
        base = self.base(folder, 'seed = 7\n[model]\npath = "base/model"\ndtype = "fp32"\n[data.other]\npath = "o/o"\n')
        loaded = load(folder, 'extends = "base/base.toml"\n' + SMALL)
        assert (loaded.recipe.seed, loaded.recipe.model.dtype, loaded.recipe.model.path) == (7, "fp32", "owner/model")
        assert set(loaded.recipe.data) == {"other", "qa"}
        assert loaded.where(("model", "dtype")) == f"{base}:4"
        assert loaded.where(("model", "path")) == f"{folder}/recipe.toml:3"
        assert loaded.where(("seed",)) == f"{base}:1"

    def test_the_list_of_stages_is_replaced(self, folder: Path) -> None:
        stages = '[[stage]]\nkind = "sft"\ndata = "x"\nsteps = 3\n' * 3
        self.base(folder, stages)
        loaded = load(folder, 'extends = "base/base.toml"\n' + SMALL)
        assert len(loaded.recipe.stage) == 2
        assert sft(loaded).steps is None
        assert not loaded.where.given(("stage", 0, "steps"))

    @pytest.mark.parametrize(("kind", "rank"), [("lora", 8), ("full", None)])
    def test_a_table_of_another_kind_is_replaced_whole(self, folder: Path, kind: str, rank: int | None) -> None:
        self.base(folder, '[adapter]\nkind = "lora"\nrank = 8\n')
        loaded = load(folder, 'extends = "base/base.toml"\n' + SMALL.replace('"lora"\nrank = 4', f'"{kind}"'))
        assert loaded.recipe.adapter == (Lora(rank=rank) if rank else Full())
        assert loaded.where.given(("adapter", "rank")) == (rank is not None)

    def test_paths_count_from_the_file_that_gives_them(self, folder: Path) -> None:
        self.base(folder, '[data.b]\npath = "rows.jsonl"\nformat = "text"\n')
        (folder / "base" / "rows.jsonl").touch()
        loaded = load(folder, 'extends = "base/base.toml"\n' + SMALL)
        assert loaded.recipe.data["b"].path == str(folder / "base" / "rows.jsonl")

    def test_a_mistake_in_the_base_is_told_with_the_base_s_line(self, folder: Path) -> None:
        base = self.base(folder, "\nsed = 1\n")
        [problem] = problems(folder, 'extends = "base/base.toml"\n' + SMALL)
        assert (problem.where, problem.key) == (f"{base}:2", "sed")

    def test_a_slip_of_toml_in_the_base_is_told_with_the_base_s_line(self, folder: Path) -> None:
        base = self.base(folder, "\nseed = x\n")
        [problem] = problems(folder, 'extends = "base/base.toml"\n' + SMALL)
        assert problem.where == f"{base}:2"

    def test_a_base_may_not_extend(self, folder: Path) -> None:
        base = self.base(folder, 'seed = 1\nextends = "x.toml"\n')
        [problem] = problems(folder, 'extends = "base/base.toml"\n' + SMALL)
        assert (problem.where, problem.key) == (f"{base}:2", "extends")

    def test_a_missing_base_is_told_with_the_path_that_was_tried(self, folder: Path) -> None:
        [problem] = problems(folder, SMALL.replace("\n", '\nextends = "none.toml"\n', 1))
        assert (problem.where, problem.key) == (f"{folder}/recipe.toml:2", "extends")
        assert f"{folder}/none.toml" in problem.message

    def test_a_base_that_is_no_text_is_a_wrong_type(self, folder: Path) -> None:
        [problem] = problems(folder, "extends = 3\n" + SMALL)
        assert problem.message == "expected text, got 3"


class TestSet:
    @pytest.mark.parametrize(
        ("setting", "value"),
        [
            ("stage.0.learning_rate=1e-4", 1e-4),
            ("stage.sft.learning_rate=1e-4", 1e-4),
            ('stage."sft".learning_rate = 2', 2),
        ],
    )
    def test_a_stage_is_named_by_place_or_kind(self, folder: Path, setting: str, value: float) -> None:
        loaded = load(folder, SMALL, setting)
        assert sft(loaded).learning_rate == value
        assert loaded.where(("stage", 0, "learning_rate")) == f"--set {setting}"

    def test_text_needs_no_quotes_and_may_have_them(self, folder: Path) -> None:
        recipe = load(
            folder, SMALL, "name=other-1", 'model.path="o/m"', "model.revision=a=b", "deterministic=true"
        ).recipe
        assert (recipe.name, recipe.model.path, recipe.model.revision) == ("other-1", "o/m", "a=b")
        assert recipe.deterministic is True

    def test_tables_that_are_not_there_are_made(self, folder: Path) -> None:
        recipe = load(folder, SMALL, "optimizer.name=paged_adamw", "stage.0.parallel.nodes=2").recipe
        assert recipe.optimizer.name == "paged_adamw"
        assert recipe.stage[0].parallel.nodes == 2  # type: ignore[union-attr]

    def test_it_wins_over_the_file_and_the_base(self, folder: Path) -> None:
        (folder / "base.toml").write_text("seed = 1\n")
        assert load(folder, 'seed = 2\nextends = "base.toml"\n' + SMALL, "seed=3").recipe.seed == 3

    def test_the_last_of_two_wins(self, folder: Path) -> None:
        assert load(folder, SMALL, "seed=3", "seed=4").recipe.seed == 4

    def test_another_kind_clears_the_table_and_not_what_is_set_besides(self, folder: Path) -> None:
        cleared = load(folder, SMALL, "adapter.kind=full")
        assert cleared.recipe.adapter == Full()
        assert not cleared.where.given(("adapter", "rank"))
        text = SMALL.replace('"lora"\nrank = 4', '"full"')
        assert load(folder, text, "adapter.rank=2", "adapter.kind=lora").recipe.adapter == Lora(rank=2)
        assert load(folder, SMALL, "adapter.kind=lora").recipe.adapter == Lora(rank=4)

    def test_another_path_clears_what_was_said_of_the_old_one_and_not_what_is_set_besides(self, folder: Path) -> None:
        text = SMALL + '[data.hub]\npath = "owner/hub"\nconfig = "a"\nsplit = "train_sft"\nrevision = "r"\nlimit = 3\n'
        here = load(folder, text, "data.hub.config=b", "data.hub.path=owner/other").recipe.data["hub"]
        assert (here.path, here.config, here.split, here.revision, here.limit) == ("owner/other", "b", "train", None, 3)
        assert load(folder, text, "data.hub.path=owner/hub").recipe.data["hub"].config == "a"

    def test_steps_take_the_place_of_epochs(self, folder: Path) -> None:
        text = SMALL.replace('kind = "sft"\n', 'kind = "sft"\nepochs = 3\n')
        stage = sft(load(folder, text, "stage.sft.steps=2"))
        assert (stage.steps, stage.epochs) == (2, None)
        stage = sft(load(folder, text.replace("epochs", "steps"), "stage.sft.epochs=2"))
        assert (stage.steps, stage.epochs) == (None, 2)
        stage = sft(load(folder, text, "stage.sft.steps=2", "stage.sft.epochs=4"))
        assert (stage.steps, stage.epochs) == (2, 4), "the rules ask which one is meant"

    def test_paths_count_from_the_working_directory(self, folder: Path) -> None:
        (folder / "rows.jsonl").touch()
        (Path.cwd() / "rows.jsonl").touch()
        recipe = load(folder, SMALL.replace("owner/rows", "rows.jsonl"), "data.b.path=rows.jsonl").recipe
        assert recipe.data["qa"].path == str(folder / "rows.jsonl")
        assert recipe.data["b"].path == str(Path.cwd() / "rows.jsonl")

    @pytest.mark.parametrize(
        ("setting", "key", "message", "remedy"),
        [
            ("seed", "", "not of the form key.path=value", "write for example"),
            ("=3", "", "not of the form key.path=value", "write for example"),
            ("a b=3", "", "not of the form key.path=value", "write for example"),
            ("sed=3", "sed", "not a known key", 'did you mean "seed"?'),
            ("stage.0.lr=3", "stage[0].lr", "not a known key", '"learning_rate"'),
            ("stage.7.steps=3", "", 'stage has no element "7"', 'stage.0 ("sft") or stage.1 ("merge")'),
            ("stage.dpo.steps=3", "", 'stage has no element "dpo"', 'stage.0 ("sft") or stage.1 ("merge")'),
            ("name.x=3", "", "name holds a value and no keys", "set name itself"),
            ("extends=x.toml", "", "counts only where it stands in a recipe", "in the file"),
            ("name=5", "name", "one word of letters", 'write name = "5"'),
            ("model.path=''", "model.path", "expected text, got ''", "give it such a value"),
            ("seed=1\nname='x'", "seed", "control character '\\n'", "remove"),
            ("data.b.format=text", "data.b.path", "is missing", "to [data.b]"),
            ("model.path=./none", "model.path", "there is no {cwd}/none", "correct the path"),
        ],
    )
    def test_what_cannot_be_set_is_a_problem(
        self, folder: Path, setting: str, key: str, message: str, remedy: str
    ) -> None:
        [problem] = problems(folder, SMALL, setting)
        assert (problem.where, problem.key) == (f"--set {setting}", key)
        assert message.replace("{cwd}", str(Path.cwd())) in problem.message
        assert remedy in problem.remedy

    def test_a_kind_that_two_stages_have_names_neither(self, folder: Path) -> None:
        [problem] = problems(folder, SMALL + '[[stage]]\nkind = "sft"\ndata = "qa"\n', "stage.sft.steps=3")
        assert problem.message == '2 of stage are of kind "sft"'
        assert 'stage.0 ("sft")' in problem.remedy

    def test_its_mistakes_and_the_file_s_are_told_together(self, folder: Path) -> None:
        found = problems(folder, "sed = 1\n" + SMALL, "foo", "seed=x")
        assert {problem.where for problem in found} == {"--set foo", "--set seed=x", f"{folder}/recipe.toml:1"}


class TestPaths:
    def data_path(self, folder: Path, written: str) -> str:
        return load(folder, SMALL.replace("owner/rows", written)).recipe.data["qa"].path

    @pytest.mark.parametrize("written", ["rows.jsonl", "./rows.jsonl", "../recipes/rows.jsonl", "{folder}/rows.jsonl"])
    def test_what_exists_is_made_absolute(self, folder: Path, written: str) -> None:
        (folder / "rows.jsonl").touch()
        assert self.data_path(folder, written.format(folder=folder)) == str(folder / "rows.jsonl")

    def test_a_hub_id_stays_one_where_a_folder_has_its_name_and_the_user_is_told(self, folder: Path) -> None:
        assert load(folder).remarks == ()
        (folder / "owner" / "rows").mkdir(parents=True)
        loaded = load(folder)
        assert loaded.recipe.data["qa"].path == "owner/rows"
        told = "owner/rows is a hub id; what is here has to be written ./owner/rows"
        assert loaded.remarks == (f"data.qa.path: {told}",)
        assert self.data_path(folder, "./owner/rows") == str(folder / "owner" / "rows")

    @pytest.mark.parametrize("key", ["model.path", "data.qa.path", "stage.0.model.path"])
    def test_a_name_of_one_part_is_refused_where_something_here_has_it(self, folder: Path, key: str) -> None:
        load(folder, SMALL, f"{key}=gpt2")
        (Path.cwd() / "gpt2").mkdir()
        [problem] = problems(folder, SMALL, f"{key}=gpt2")
        assert problem.message == f'"gpt2" could be {Path.cwd()}/gpt2 or a hub id'
        assert problem.remedy == "write ./gpt2 for what is here, or the hub id with its owner: OWNER/gpt2"
        load(folder, SMALL, f"{key}=./gpt2")
        load(folder, SMALL, f"{key}=openai-community/gpt2")

    def test_a_link_keeps_its_name(self, folder: Path) -> None:
        (folder / "blob").touch()
        (folder / "rows.csv").symlink_to("blob")
        assert self.data_path(folder, "rows.csv") == str(folder / "rows.csv")

    def test_the_home_folder_is_filled_in(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", str(folder))
        (folder / "rows.csv").touch()
        assert self.data_path(folder, "~/rows.csv") == str(folder / "rows.csv")

    def test_a_model_is_a_folder(self, folder: Path) -> None:
        (folder / "model.safetensors").touch()
        [problem] = problems(folder, SMALL.replace("owner/model", "model.safetensors"))
        assert "model.safetensors is a file" in problem.message

    def test_a_stage_s_model_is_found_too(self, folder: Path) -> None:
        (folder / "m").mkdir()
        stage = sft(load(folder, SMALL, "stage.0.model.path=../recipes/m"))
        assert stage.model is not None
        assert stage.model.path == str(folder / "m")

    @pytest.mark.parametrize("word", ["tokenizer", "llama2", "chatml", "none"])
    def test_a_template_word_is_no_file(self, folder: Path, word: str) -> None:
        (folder / word).touch()
        text = SMALL.replace("[data.qa]", f'[data.qa]\ntemplate = "{word}"')
        assert load(folder, text).recipe.data["qa"].template == word

    def test_a_template_file_is_made_absolute(self, folder: Path) -> None:
        (folder / "chat.jinja").touch()
        text = SMALL.replace("[data.qa]", '[data.qa]\ntemplate = "chat.jinja"')
        assert load(folder, text).recipe.data["qa"].template == str(folder / "chat.jinja")

    def test_a_path_that_the_system_refuses_is_a_problem(self, folder: Path) -> None:
        [problem] = problems(folder, SMALL.replace("owner/rows", "x" * 5000))
        assert "File name too long" in problem.message

    def test_a_new_key_is_settled_by_what_its_type_says(self, folder: Path) -> None:
        class Judge(Kind, frozen=True, kw_only=True):
            path: ModelName | None = None
            rows: list[DataName]
            by_language: dict[str, TemplateName]

        class Plain(Kind, frozen=True, kw_only=True):
            path: str = ""

        class Whole(Table, frozen=True, kw_only=True):
            judge: list[Judge | Plain]

        (folder / "m").mkdir()
        (folder / "a.csv").touch()
        (folder / "de.jinja").touch()
        toy = {"kind": "judge", "path": "./m", "rows": ["a.csv", "none.csv"], "by_language": {"de": "de.jinja"}}
        where = SourceMap(Source("toy", folder), {})
        settled = paths.settle(Whole, {"judge": [{"kind": "plain", "path": "./m"}, toy]}, where, set())
        by_language = {"de": str(folder / "de.jinja")}
        made = toy | {
            "path": str(folder / "m"),
            "rows": [str(folder / "a.csv"), "none.csv"],
            "by_language": by_language,
        }
        assert settled.values == {"judge": [{"kind": "plain", "path": "./m"}, made]}
        assert [problem.key for problem in settled.problems] == ["judge[1].rows[1]"]

    def test_a_wrong_type_is_told_once(self, folder: Path) -> None:
        [problem] = problems(folder, SMALL.replace('"owner/rows"', "[]"))
        assert problem.key == "data.qa.path"
