defmodule Mix.Tasks.Tinkex.CustomLoss.Setup do
  @shortdoc "Makes the Python environment that Tinkex.CustomLoss runs in"

  @moduledoc """
  Makes a Python environment with all that `Tinkex.CustomLoss` needs.

      mix tinkex.custom_loss.setup
      mix tinkex.custom_loss.setup --python python3.12 --extra sandbox
      mix tinkex.custom_loss.setup -- torch==2.13.0 --index-url https://mirror.example/simple

  The environment is made in `.venv` of the current directory, where pools find it without being
  told, and holds the Python package from the sources of this one, with PyTorch and the `tinker` SDK.
  An environment that is there is kept, and what it lacks is added. It takes some minutes the first
  time, since PyTorch is large.

  `uv` does the work where it is on PATH, `venv` and `pip` where it is not.

  ## Options

    * `--dir` - where to make it, instead of `.venv`; then name `DIR/bin/python` in the option
      `:python` or in `TINKEX_CUSTOM_LOSS_PYTHON`
    * `--python` - the Python to make it with, 3.11 or newer. Default `python3`
    * `--extra` - an extra of the package: `sandbox`, for the loopback server. Repeatable

  What follows `--` is passed to `pip install` or `uv pip install`: name a version or an index there to
  choose the build of PyTorch, which by default is the newest, on Linux with some gigabytes of CUDA.
  """

  use Mix.Task

  @switches [dir: :string, python: :string, extra: :keep]

  @impl true
  def run(args) do
    {ours, installer_args} = Enum.split_while(args, &(&1 != "--"))

    opts =
      case OptionParser.parse(ours, strict: @switches) do
        {opts, [], []} -> opts
        {_, [word | _], _} -> Mix.raise("#{word}: expected options; see mix help #{name()}")
        {_, _, [{option, _} | _]} -> Mix.raise("#{option}: see mix help #{name()}")
      end

    dir = Path.expand(opts[:dir] || ".venv")
    uv = System.find_executable("uv")
    python = Path.join(dir, "bin/python")

    base = if opts[:python] || not File.exists?(python), do: base_python(opts[:python])

    if File.exists?(python),
      do: say("using the environment in #{dir}"),
      else: make(uv, base, dir)

    install(uv, python, Keyword.get_values(opts, :extra), Enum.drop(installer_args, 1))

    say(
      "done; to check it: mix tinkex.custom_loss.doctor" <>
        if(opts[:dir], do: " --python #{python}", else: "")
    )
  end

  defp base_python(given) do
    name = given || "python3"

    python =
      System.find_executable(name) ||
        Mix.raise(
          "there is no #{name}#{if given, do: "", else: " on PATH"}: install Python 3.11 or " <>
            "newer, or say where it is with --python"
        )

    case System.cmd(python, ["-c", "import sys; print(sys.version_info >= (3, 11))"]) do
      {"True" <> _, 0} -> python
      _ -> Mix.raise("#{python} is older than Python 3.11; name a newer one with --python")
    end
  end

  defp make(nil, python, dir) do
    say("making an environment in #{dir} with #{python}")
    cmd!(python, ["-m", "venv", dir])
  end

  defp make(uv, python, dir) do
    say("making an environment in #{dir} with #{python} and uv")
    cmd!(uv, ["venv", "--python", python, dir])
  end

  # From a copy, so that building leaves nothing among the sources of a dependency.
  defp install(uv, python, extras, args) do
    # A name that nobody else has, nor can prepare: others use the directory, too.
    name = "tinker-custom-loss-#{System.pid()}-#{:rand.uniform(0x1_0000_0000_0000)}"
    copy = Path.join(System.tmp_dir!(), name)
    File.mkdir!(copy)

    try do
      for name <- ["pyproject.toml", "README.md", "LICENSE", "python"],
          do: File.cp_r!(Path.join(root(), name), Path.join(copy, name))

      target = if extras == [], do: copy, else: "#{copy}[#{Enum.join(extras, ",")}]"
      say("installing the package, PyTorch and tinker (minutes, the first time)")

      if uv,
        do: cmd!(uv, ["pip", "install", "--python", python, target | args]),
        else: cmd!(python, ["-m", "pip", "install", "--disable-pip-version-check", target | args])
    after
      File.rm_rf!(copy)
    end
  end

  # Of this package: a dependency of the project, or the project.
  defp root, do: Mix.Project.deps_paths()[:tinkex_custom_loss] || File.cwd!()

  defp cmd!(program, args) do
    case System.cmd(program, args, into: IO.stream(:stdio, :line), stderr_to_stdout: true) do
      {_, 0} -> :ok
      {_, status} -> Mix.raise("#{program} #{hd(args)} failed with status #{status}; see above")
    end
  end

  defp say(text), do: Mix.shell().info("setup: " <> text)
  defp name, do: Mix.Task.task_name(__MODULE__)
end
