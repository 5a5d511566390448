"""`keras-gemma2 chat`, as a user types it."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from test_chat_session import small_lm

from keras_gemma2.cli import main
from keras_gemma2.cli_chat import converse

COMMAND = [sys.executable, "-m", "keras_gemma2", "chat"]


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """A small random model, quick to load and compile."""
    folder = tmp_path_factory.mktemp("presets") / "small"
    small_lm().save_to_preset(folder)
    return str(folder)


class Echo:
    """A chat that answers in upper case, word by word; `!` breaks off as Ctrl-C does, `?` is an error."""

    def __init__(self):
        self.heard, self.closed, self.saved, self.resets = [], 0, [], 0

    def stream(self, text):
        self.heard.append(text)
        if text == "?":
            raise ValueError("The conversation has\nno room left.")
        return self._pieces(text)

    def _pieces(self, text):
        try:
            for word in text.upper().split():
                if word == "!":
                    raise KeyboardInterrupt
                yield f"{word} "
        finally:
            self.closed += 1

    def reset(self):
        self.resets += 1

    def save(self, path):
        if path == "nowhere":
            raise PermissionError(13, "Permission denied", path)
        self.saved.append(path)


@pytest.fixture
def terminal(monkeypatch):
    """Types lines into `converse`; an exception in place of a line is raised. The end of input comes last."""

    def type_lines(*lines, chat=None):
        lines, prompts = iter([*lines, EOFError()]), []

        def read(prompt=""):
            prompts.append(prompt)
            line = next(lines)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        chat = chat or Echo()
        assert converse(chat, interactive=True) == 0
        assert set(prompts) == {"> "}
        return chat, len(prompts)

    return type_lines


@pytest.mark.backend_free
def test_answers_come_piece_by_piece(terminal, capsys):
    chat, prompts = terminal("hello there", "", "   ", "again")
    assert chat.heard == ["hello there", "again"] and prompts == 5 and chat.closed == 2
    assert capsys.readouterr().out == "HELLO THERE \nAGAIN \n"


@pytest.mark.backend_free
def test_ctrl_c_stops_an_answer_and_leaves_at_the_prompt(terminal, capsys):
    chat, prompts = terminal("one ! two", "three", KeyboardInterrupt(), "never read")
    captured = capsys.readouterr()
    assert captured.out == "ONE \nTHREE \n" and "[stopped]" in captured.err
    assert chat.heard == ["one ! two", "three"] and prompts == 3 and chat.closed == 2


@pytest.mark.backend_free
def test_an_interrupt_waits_for_the_piece_and_a_second_one_does_not(terminal, capsys):
    class Interrupted(Echo):
        def _pieces(self, text):
            for word in text.split():
                for _ in range(word.count("!")):
                    held = signal.getsignal(signal.SIGINT)
                    signal.raise_signal(signal.SIGINT)
                    # Python runs a handler when it comes to it, and one for signals that came together: each is waited for. The
                    # first sets another handler, the second raises.
                    for _ in range(1000):
                        if signal.getsignal(signal.SIGINT) is not held:
                            break
                        time.sleep(0.01)
                yield word

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background of a shell has it ignored
    try:
        terminal("one two! three", "four five!! six", "seven", chat=Interrupted())
        captured = capsys.readouterr()
        assert captured.out == "onetwo!\nfour\nseven\n" and captured.err.count("[stopped]") == 2
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.backend_free
def test_commands(terminal, capsys):
    chat, prompts = terminal(
        "/reset", "/save a file.json", " /not a command, with a space before it", "//slash", "/help", "/quit", "x"
    )
    captured = capsys.readouterr()
    assert chat.resets == 1 and chat.saved == ["a file.json"] and prompts == 6
    assert chat.heard == [" /not a command, with a space before it", "/slash"]
    for text in ("/reset", "/save FILE", "/help", "/quit", "Ctrl-C", "Saved to a file.json."):
        assert text in captured.err and text not in captured.out


@pytest.mark.backend_free
def test_mistakes_are_told_and_the_conversation_goes_on(terminal, capsys):
    chat, _ = terminal("?", "/save", "/save nowhere", "/quit now", "/what", "still here")
    captured = capsys.readouterr()
    assert captured.out == "STILL HERE \n" and chat.heard == ["?", "still here"] and chat.saved == []
    told = captured.err.splitlines()
    assert told[0] == "The conversation has no room left." and "Permission denied" in told[2]
    assert all("is none of /reset, /save FILE, /help and /quit" in told[i] for i in (1, 3, 4)) and "//what" in told[4]


@pytest.mark.backend_free
def test_a_model_cannot_steer_the_terminal(terminal, capsys):
    class Hostile(Echo):
        def _pieces(self, text):
            yield "a\x1b]0;title\x07\x9b2J\r\b\x7f\tb\n"

    terminal("x", chat=Hostile())
    assert capsys.readouterr().out == "a\ufffd]0;title\ufffd\ufffd2J\ufffd\ufffd\ufffd\tb\n"


def test_out_of_a_pipe_stdout_holds_the_answers_alone(preset):
    lines = "Fellow citizens\n\n/reset\nFellow citizens"
    options = ["--temperature", "0", "--max-new-tokens", "6", "--system", "Be brief."]
    result = subprocess.run([*COMMAND, preset, *options], input=lines, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    answer = result.stdout[: len(result.stdout) // 2]
    assert result.stdout == 2 * answer and len(answer) > 6 and answer.endswith("\n")
    assert "forgotten" in result.stderr and "> " not in result.stderr and "Traceback" not in result.stderr


def test_in_process_with_save_and_load(preset, capsys, monkeypatch, tmp_path):
    path = tmp_path / "chat.json"
    arguments = ["chat", preset, "--max-new-tokens", "6", "--temperature", "0"]

    def run(lines, *more):
        read = iter(lines)
        monkeypatch.setattr(sys.stdin, "readline", lambda: next(read, ""), raising=False)
        monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
        code = main([*arguments, *more])
        return code, capsys.readouterr()

    code, first = run(["The union\n", f"/save {path}\n", "The army\n"])
    assert code == 0 and str(path) in first.err
    messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
    assert [m["role"] for m in messages] == ["user", "model"] and first.out.startswith(messages[1]["content"])
    assert len(first.out) > len(messages[1]["content"]) + 2, "it answered again"
    code, second = run([f"/save {tmp_path / 'again.json'}"], "--load", str(path))
    assert code == 0 and second.out == "" and (tmp_path / "again.json").read_bytes() == path.read_bytes()
    code, mistaken = run(["/what\n", "never read\n"])
    assert code == 2 and mistaken.out == "" and mistaken.err.count("\n") == 1 and "keras-gemma2: '/what' is none of" in mistaken.err
    code, full = run(["the union " * 300 + "\n"])
    assert code == 2 and "room for 512" in full.err


@pytest.mark.backend_free
@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: preset"),
        (["gemma2_mini_em"], "Unknown preset 'gemma2_mini_em'"),
        (["gemma2_mini_en", "--temperature", "-1"], "--temperature"),
        (["gemma2_mini_en", "--max-new-tokens", "0"], "--max-new-tokens.*at least 1"),
        (["gemma2_mini_en", "--load", "missing.json"], "--load: there is no file 'missing.json'"),
        (["gemma2_mini_en", "--load", "x", "--system", "y"], "--system: the conversation of --load has its own"),
    ],
)
def test_wrong_arguments_give_one_line_and_exit_code_2(arguments, message, capsys):
    try:
        code = main(["chat", *arguments])
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and captured.err.count("\n") == 1 and re.search(message, captured.err)


@pytest.mark.backend_free
def test_a_file_without_a_conversation_is_told_before_a_model_loads(tmp_path, monkeypatch, capsys):
    path = tmp_path / "no.json"
    path.write_text("[]")
    monkeypatch.setattr("keras_gemma2.cli._load", None)
    assert main(["chat", "gemma2_mini_en", "--load", str(path)]) == 2
    assert "must be a conversation that `Chat.save` wrote" in capsys.readouterr().err


@pytest.mark.backend_free  # whichever the suite runs, a terminal is the same on all: this takes torch
@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_on_a_terminal_ctrl_c_stops_the_answer():
    import pty

    ours, theirs = pty.openpty()
    options = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "close_fds": True, "start_new_session": True}
    command = [*COMMAND, "gemma2_mini_en", "--max-new-tokens", "480", "--seed", "1", "--backend", "torch"]
    process = subprocess.Popen(command, **options)
    os.close(theirs)
    seen = ""

    def until(text, after=0):
        nonlocal seen
        end = time.monotonic() + 120
        while text not in seen[after:]:
            assert time.monotonic() < end and select.select([ours], [], [], 60)[0], seen
            seen += os.read(ours, 4096).decode("utf-8", "replace")
        return seen.index(text, after) + len(text)  # more may have come with it

    try:
        until("> ")
        os.write(ours, b"Fellow citizens\n")
        begun = until("Fellow citizens\r\n")
        until(" ", begun)
        process.send_signal(signal.SIGINT)  # the terminal's own Ctrl-C goes to a foreground process group, which a test has not
        stopped = until("[stopped]", begun)
        until("> ", stopped)
        os.write(ours, b"/quit\n")
        assert process.wait(60) == 0 and "Traceback" not in seen
    finally:
        process.kill()
        process.wait()
        os.close(ours)
