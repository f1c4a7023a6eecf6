defmodule Tinkex.CustomLoss.ReleaseTest do
  # The package as Hex would carry it, in a project of its own, in a release of that project.
  use ExUnit.Case, async: true

  @root Path.expand("../..", __DIR__)
  @moduletag :tmp_dir
  @moduletag timeout: 300_000

  @mix_exs """
  defmodule Trainer.MixProject do
    use Mix.Project

    def project do
      [
        app: :trainer,
        version: "1.0.0",
        deps: [{:tinkex_custom_loss, path: "../package"}],
        releases: [
          trainer: [
            steps: [:assemble, &Tinkex.CustomLoss.Release.python/1, :tar],
            custom_loss: [args: ["--no-index", "--no-build-isolation", "--no-deps"]]
          ]
        ]
      ]
    end

    def application, do: [mod: {Trainer, []}, extra_applications: [:logger]]
  end
  """

  @trainer """
  defmodule Trainer do
    use Application

    def start(_type, _args) do
      children = [
        {Tinkex.CustomLoss, name: Trainer.Loss},
        {Task, &step/0}
      ]

      Supervisor.start_link(children, strategy: :one_for_one)
    end

    defp step do
      {:ok, output} =
        Tinkex.CustomLoss.compute(Trainer.Loss, nil, [[-0.5, -1.5]], base_loss: :l2)

      IO.puts("gradients \#{inspect(output.gradients)}")
      IO.puts("sources \#{Application.app_dir(:tinkex_custom_loss, "priv/python")}")
      {:ok, python} = Tinkex.CustomLoss.Pool.Python.find(nil)
      IO.puts("python \#{python}")
      System.stop()
    end
  end
  """

  # The files that `package: [files: ...]` lists, as `mix hex.build` would take them.
  defp package!(target) do
    files =
      for pattern <- Mix.Project.config()[:package][:files],
          found = Path.wildcard(Path.join(@root, pattern), match_dot: true),
          path <- found,
          do: path

    for path <- files do
      copy = Path.join(target, Path.relative_to(path, @root))
      File.mkdir_p!(Path.dirname(copy))
      File.cp_r!(path, copy)
    end
  end

  # With the packages of the Python that runs the tests, so that nothing is downloaded.
  defp packages(python) do
    program = "import site; print(':'.join(site.getsitepackages()))"
    {paths, 0} = System.cmd(python, ["-c", program])
    [{"PYTHONPATH", String.trim(paths)}]
  end

  defp cmd!(program, args, dir, env) do
    clean =
      for name <- ["MIX_ENV", "TINKEX_PATH", "MIX_BUILD_PATH", "MIX_BUILD_ROOT", "VIRTUAL_ENV"],
          do: {name, nil}

    # Nothing is to be asked of Hex, also where it is installed.
    clean = [{"TINKEX_CUSTOM_LOSS_DEPS", "none"}, {"HEX_OFFLINE", "1"} | clean]
    env = clean ++ env
    {output, status} = System.cmd(program, args, cd: dir, env: env, stderr_to_stdout: true)
    assert status == 0, output
    output
  end

  test "a release carries the Python sources, an environment if it is asked to, and computes a gradient",
       %{tmp_dir: tmp} do
    package!(Path.join(tmp, "package"))
    project = Path.join(tmp, "trainer")
    File.mkdir_p!(Path.join(project, "lib"))
    File.write!(Path.join(project, "mix.exs"), @mix_exs)
    File.write!(Path.join(project, "lib/trainer.ex"), @trainer)

    {:ok, python} = Tinkex.CustomLoss.Pool.Python.find(nil)
    # A Python is looked for in PATH first.
    path = {"PATH", Path.dirname(python) <> ":" <> System.get_env("PATH")}
    none = {"TINKEX_CUSTOM_LOSS_PYTHON", nil}

    # What a user of the package has to build must build without warnings.
    env = [{"MIX_ENV", "prod"}, path, none | packages(python)]
    output = cmd!("mix", ["release", "--quiet"], project, env)
    refute output =~ "warning", output

    # Elsewhere, with everything that it was built from gone.
    release = Path.join(tmp, "deployed")
    File.mkdir!(release)
    tar = Path.join(project, "_build/prod/trainer-1.0.0.tar.gz")
    {_, 0} = System.cmd("tar", ["-xzf", tar, "-C", release])
    File.rm_rf!(project)
    File.rm_rf!(Path.join(tmp, "package"))
    start = &cmd!(Path.join(release, "bin/trainer"), ["start"], release, &1)

    output = start.([none | packages(python)])
    assert output =~ "gradients [[-1.0, -3.0]]"
    assert output =~ "python #{release}/python/bin/python\n"
    assert [_, sources] = Regex.run(~r/^sources (.*)$/m, output)
    assert String.starts_with?(sources, release)
    assert File.regular?(Path.join(sources, "tinker_custom_loss/port/__main__.py"))
    # So that an environment can be made where the release runs.
    assert File.regular?(Path.join(sources, "../pyproject.toml"))

    # With another one.
    File.rm_rf!(Path.join(release, "python"))
    output = start.([{"TINKEX_CUSTOM_LOSS_PYTHON", python}, {"PYTHONPATH", nil}])
    assert output =~ "gradients [[-1.0, -3.0]]"
    assert output =~ "python #{python}\n"
  end
end
