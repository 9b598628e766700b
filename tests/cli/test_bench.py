"""`cottention bench`: flags to settings, one line for mistakes, results on stdout."""

from __future__ import annotations

import json

import pytest

from cottention.benchmarks import attention, roofline
from cottention.benchmarks.settings import FULL_GRID, AttentionSettings, DecodeSettings
from cottention.cli import bench
from cottention.cli.main import main
from tests.benchmarks.memory_forks import measure_in_forks
from tests.subprocesses import run_python


def settings_of(*flags: str) -> AttentionSettings:
    return bench.settings_from(bench.build_parser().parse_args(["attention", *flags]).attention)


def test_without_flags_the_defaults_are_measured():
    assert settings_of() == AttentionSettings()


def test_every_flag_arrives():
    settings = settings_of(
        *("--lengths", "128, 4096", "--head-dims=32,64", "--batch-heads", "8,8x12", "--dtypes", "bfloat16,float32"),
        *("--bidirectional", "--forward", "--implementations", "chunk,auto", "--peers", "none"),
        *("--repeats", "3", "--time-limit-s", "1.5", "--memory-limit-gib", "2", "--device", "cuda"),
    )
    assert settings == AttentionSettings(
        lengths=(128, 4096),
        head_dims=(32, 64),
        batch_heads=((1, 8), (8, 12)),
        dtypes=("bfloat16", "float32"),
        directions=("bidirectional",),
        passes=("forward",),
        implementations=("chunk", "auto"),
        peers=(),
        repeats=3,
        time_limit_s=1.5,
        memory_limit_gib=2,
        device="cuda",
    )


def test_directions_and_passes_add_up():
    assert settings_of("--causal", "--bidirectional").directions == ("causal", "bidirectional")
    assert settings_of("--backward").passes == ("forward+backward",)
    assert settings_of("--forward", "--backward").passes == ("forward", "forward+backward")


def test_full_measures_the_whole_grid_but_what_a_flag_says():
    settings = settings_of("--full", "--dtypes", "float32", "--causal")
    assert settings.lengths == FULL_GRID["lengths"]
    assert settings.batch_heads == FULL_GRID["batch_heads"]
    assert settings.dtypes == ("float32",)
    assert settings.directions == ("causal",)
    assert settings.time_limit_s == FULL_GRID["time_limit_s"]
    assert settings_of("--full", "--time-limit-s", "3").time_limit_s == 3


def decode_settings_of(*flags: str) -> DecodeSettings:
    return bench.decode_settings_from(bench.build_parser().parse_args(["decode", *flags]).decode)


def test_flags_of_decode_arrive():
    assert decode_settings_of() == DecodeSettings()
    settings = decode_settings_of(
        *("--positions", "10,20", "--batch-sizes", "1,8", "--num-heads", "3", "--head-dim", "32"),
        *("--dtype", "bfloat16", "--implementations", "torch,sdpa", "--repeats", "2", "--time-limit-s", "1"),
    )
    assert settings == DecodeSettings(
        positions=(10, 20),
        batch_sizes=(1, 8),
        num_heads=3,
        head_dim=32,
        dtype="bfloat16",
        implementations=("torch", "sdpa"),
        repeats=2,
        time_limit_s=1,
    )


def test_decode_prints_its_table_or_one_json_object(capsys, tmp_path):
    command = ["bench", "decode", "--positions", "5", "--num-heads", "1", "--repeats", "1"]
    command += ["--implementations", "torch", "--output-dir", str(tmp_path)]
    assert main(command) == 0
    assert str(tmp_path / "decode.json") in capsys.readouterr().out
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "decode.json").read_text())
    assert main(["bench", "decode", "--positions", "many"]) == 2
    assert "--positions takes whole numbers, as in 128,512; got 'many'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lengths", "128,many"], "--lengths takes whole numbers, as in 128,512; got 'many'"),
        (["--lengths", "0"], "lengths must be whole numbers of at least 1; got (0,)"),
        (["--batch-heads", "8x"], "--batch-heads takes whole numbers, as in 128,512; got ''"),
        (["--dtypes", "float23"], "did you mean 'float32'?"),
        (["--implementations", "chnk"], "got 'chnk'; did you mean 'chunk'?"),
        (["--peers", "spda"], "got 'spda'; did you mean 'sdpa'?"),
        (["--lenghts", "8"], "unknown option --lenghts; did you mean '--lengths'?"),
        (["--implementations", "none", "--peers", "none"], "there is nothing to measure"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, message, capsys, tmp_path):
    assert main(["bench", "attention", *flags, "--output-dir", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_help_needs_no_torch():
    ran = run_python(
        """
        import sys
        from cottention.cli.main import main
        code = main(["bench", "attention", "--help"])
        assert "torch" not in sys.modules and "matplotlib" not in sys.modules
        sys.exit(code)
        """
    )
    assert "--time-limit-s" in ran.stdout


@pytest.fixture
def _quick(monkeypatch):
    measure_in_forks(monkeypatch)
    monkeypatch.setattr(roofline, "_MATRIX", 32)
    monkeypatch.setattr(roofline, "_COPIED_BYTES", 1 << 12)
    monkeypatch.setattr(roofline, "_SAMPLE_S", 0.0)


ONE_POINT = [
    *(
        "bench",
        "attention",
        "--lengths",
        "64",
        "--head-dims",
        "16",
        "--batch-heads",
        "1",
        "--forward",
        "--repeats",
        "1",
    ),
    *("--implementations", "chunk", "--peers", "none"),
]


@pytest.mark.usefixtures("_quick")
def test_the_table_goes_to_stdout_and_names_the_files(capfd, tmp_path):
    assert main([*ONE_POINT, "--output-dir", str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    assert "causal forward, float32, B = 1, H = 1, K = V = 16" in out
    assert str(tmp_path / "attention.json") in out
    assert "checking values" in err


@pytest.mark.usefixtures("_quick")
def test_json_is_one_object_equal_to_the_file(capsys, tmp_path):
    assert main([*ONE_POINT, "--json", "--output-dir", str(tmp_path)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "attention.json").read_text())
    assert printed["results"][0]["time"]["median_s"] > 0


@pytest.mark.usefixtures("_quick")
def test_an_interrupted_run_writes_what_it_has_and_says_so(monkeypatch, capsys, tmp_path):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(attention, "measure_memory", interrupted)
    assert main([*ONE_POINT, "--output-dir", str(tmp_path)]) == 130
    assert "The run was interrupted" in capsys.readouterr().out
    assert json.loads((tmp_path / "attention.json").read_text())["interrupted"] is True
