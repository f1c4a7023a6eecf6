defmodule Tinkex.CustomLoss.SetupTest do
  # Environments that are made in earnest, but without downloads: what the package depends on is that
  # of the Python which runs the tests, and the package itself is built and installed.
  use ExUnit.Case, async: true

  import ExUnit.CaptureIO
  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss
  alias Tinkex.CustomLoss.{Options, SetupError, WorkerError}
  alias Tinkex.CustomLoss.Pool.Python
  alias Tinkex.CustomLoss.Setup.Progress

  @root Path.expand("../..", __DIR__)
  @moduletag timeout: 300_000
  @moduletag :tmp_dir
  @offline ["--no-index", "--no-build-isolation", "--no-deps"]

  setup %{tmp_dir: tmp} do
    %{dir: Path.join(tmp, "environment")}
  end

  defp real_python do
    {:ok, python} = Python.find(nil)
    python
  end

  # With the packages of the Python that runs the tests.
  defp packages do
    program = "import site; print(':'.join(site.getsitepackages()))"
    {paths, 0} = System.cmd(real_python(), ["-c", program])
    [{"PYTHONPATH", String.trim(paths)}]
  end

  # In a BEAM of its own, since the environment decides.
  defp mix(args, env) do
    env = [{"MIX_ENV", "test"}] ++ env
    System.cmd("mix", args, cd: @root, env: env, stderr_to_stdout: true)
  end

  defp make(dir, opts \\ []) do
    opts = Enum.flat_map(opts, fn {name, value} -> ["--#{name}", value] end)
    mix(["tinkex.custom_loss.setup", "--dir", dir] ++ opts ++ ["--"] ++ @offline, packages())
  end

  test "makes an environment in which doctor finds all well, and which git ignores", %{dir: dir} do
    {output, status} = make(dir, python: real_python())
    assert status == 0, output
    assert output =~ "setup: making an environment in #{dir} with #{real_python()}"
    made = Path.join(dir, "bin/python")
    assert output =~ "setup: done; to check it: mix tinkex.custom_loss.doctor --python #{made}"
    # Of pip there is nothing to read.
    refute output =~ "Processing"
    refute output =~ "Successfully"

    assert [_] =
             Path.wildcard(Path.join(dir, "lib/python*/site-packages/tinker_custom_loss/port"))

    assert File.read!(Path.join(dir, ".gitignore")) == "*\n"

    {output, status} = mix(["tinkex.custom_loss.doctor", "--python", made], packages())
    assert status == 0, output

    # Again: nothing is made, and nobody asked.
    {output, 0} = make(dir)
    assert output =~ "setup: the environment in #{dir} is complete"
    refute output =~ "installing"
  end

  @notebook Path.join(@root, "docs/getting-started.livemd")

  # The cells of the notebook as a script that shows what Livebook would, for this clone. What draws
  # ends as data, since there is no Hex to have VegaLite from.
  defp script do
    cells =
      Regex.scan(~r/^```elixir\n(.*?)^```$/ms, File.read!(@notebook), capture: :all_but_first)

    cells
    |> Enum.map_join("\n", fn [cell] -> "IO.inspect((\n#{cell}))" end)
    |> String.replace("path/to/tinker-custom-loss", @root)
    |> String.replace(~s(,\n  {:kino_vega_lite, "~> 0.1"}), "")
    |> String.replace(~r/\n\nVegaLite\.new.*?\n\)\)/s, "\n))")
    |> String.replace("torch: :cpu", "args: #{inspect(@offline)}")
  end

  test "works in a script of Mix.install, which is no project: the notebook", %{tmp_dir: tmp} do
    script = Path.join(tmp, "notebook.exs")
    File.write!(script, script())

    env = [
      {"HOME", tmp},
      {"MIX_HOME", System.get_env("MIX_HOME", Path.expand("~/.mix"))},
      {"TINKEX_CUSTOM_LOSS_DEPS", "none"},
      {"HEX_OFFLINE", "1"},
      # Where a Python is found without asking for one.
      {"PATH", Path.dirname(real_python()) <> ":" <> System.get_env("PATH")},
      {"MIX_ENV", nil},
      {"MIX_BUILD_ROOT", nil},
      {"TINKEX_PATH", nil} | packages()
    ]

    run = fn install_dir ->
      env = [{"MIX_INSTALL_DIR", Path.join(tmp, install_dir)} | env]
      System.cmd("elixir", [script], cd: tmp, env: env, stderr_to_stdout: true)
    end

    {output, status} = run.("first")
    assert status == 0, output
    # Of the call, and of the first and last step.
    assert output =~ "#Tinkex.CustomLoss.Output<\n  loss_total: 6.5281, gradients: [[3], [2]]\n"

    assert [_, losses] = Regex.run(~r/^\[([\d., \n]+)\]$/m, output)
    losses = losses |> String.split(~r/[,\s]+/) |> Enum.map(&String.to_float/1)
    assert length(losses) == 10 and List.last(losses) < hd(losses)
    # What is drawn.
    assert length(Regex.scan(~r/term: "(base_loss|smooth)"/, output)) == 20
    # Again, it is there. Mix, asked to install the same again, would look for Hex first.
    {output, status} = run.("second")
    assert status == 0, output
    assert output =~ "setup: the environment in #{tmp}/.cache/custom_loss/python is complete"
  end

  test "leaves nothing behind where it fails", %{dir: dir} do
    opts = [dir: dir, python: real_python(), args: ["--no-index", "no-such-package"]]

    output =
      capture_io(fn ->
        assert_raise SetupError, ~r/pip install .* ended with status 1/, fn ->
          CustomLoss.setup!(opts)
        end
      end)

    assert output =~ "setup: making an environment in #{dir}"
    # All that pip said, now that it matters.
    assert output =~ "No matching distribution found for "
    refute File.exists?(dir)
  end

  test "shows large downloads as they begin" do
    said = ["Collecting torch\n  Downl", "oading torch-2.13.0-cp311.whl (191.5 MB)\nDownload"]
    small = ["ing numpy (12 kB)\nDownloading cudnn (1.2GiB)\n", "Installed"]
    me = self()

    assert Enum.into(said ++ small, %Progress{say: &send(me, &1)}) == Enum.join(said ++ small)
    assert_received "downloading torch-2.13.0-cp311.whl (191.5 MB)"
    assert_received "downloading cudnn (1.2GiB)"
    refute_received "downloading numpy" <> _
  end

  test "is not done where something is missing", %{dir: dir, tmp_dir: tmp} do
    # All that building takes, and nothing that running takes.
    [{"PYTHONPATH", all}] = packages()
    File.mkdir!(Path.join(tmp, "few"))
    File.ln_s!(Path.join(all, "setuptools"), Path.join(tmp, "few/setuptools"))

    args = ["tinkex.custom_loss.setup", "--dir", dir, "--python", real_python(), "--" | @offline]
    {output, status} = mix(args, [{"PYTHONPATH", Path.join(tmp, "few")}])
    assert status == 1
    assert output =~ ~r/the installation is not complete: .* lacks cloudpickle, .* tinker, torch;/
    refute File.exists?(dir)
  end

  test "makes anew what was broken off, which no pool uses", %{dir: dir} do
    # The OS process is gone that was making it.
    {gone, 0} = System.cmd("/bin/sh", ["-c", "echo $$"])
    made = Path.join(dir, "bin/python")
    File.mkdir_p!(Path.dirname(made))
    File.cp!(real_python(), made)
    File.write!(Path.join(dir, "half"), "")
    File.write!(Path.join(dir, ".tinkex_custom_loss"), "being made by #{gone}")

    assert {:error, %WorkerError{} = error} = Python.find(made)
    assert Exception.message(error) =~ "the environment of #{made} is not finished"

    {output, status} = make(dir, python: real_python())
    assert status == 0, output
    assert output =~ "setup: the environment in #{dir} is unfinished: making it anew"
    refute File.exists?(Path.join(dir, "half"))
    assert {:ok, ^made} = Python.find(made)
  end

  test "does not touch what another one is making, or what is no environment", %{dir: dir} do
    File.mkdir_p!(dir)
    # This shell waits until the test ends.
    port = Port.open({:spawn_executable, "/bin/sh"}, [:binary, args: ["-c", "read line"]])
    {:os_pid, os_pid} = Port.info(port, :os_pid)
    File.write!(Path.join(dir, ".tinkex_custom_loss"), "being made by #{os_pid}")

    assert_raise SetupError, ~r/OS process #{os_pid} is making the environment/, fn ->
      CustomLoss.setup!(dir: dir)
    end

    Port.close(port)
    File.rm!(Path.join(dir, ".tinkex_custom_loss"))
    File.write!(Path.join(dir, "thesis.tex"), "")

    assert_raise SetupError, ~r/#{dir} is there, and is no Python environment/, fn ->
      CustomLoss.setup!(dir: dir)
    end

    assert File.ls!(dir) == ["thesis.tex"]
  end

  test "keeps an environment that is there", %{dir: dir} do
    {_, 0} = System.cmd(real_python(), ["-m", "venv", "--without-pip", dir])
    File.write!(Path.join(dir, "kept"), "")
    opts = [dir: dir, args: ["--no-index"], verbose: true]

    capture_io(fn -> assert_raise SetupError, fn -> CustomLoss.setup!(opts) end end)
    assert File.exists?(Path.join(dir, "kept"))
    refute File.exists?(Path.join(dir, ".gitignore"))
  end

  test "refuses a Python that is too old, or not there", %{dir: dir} do
    assert {output, 1} = make(dir, python: fixture("python_3_9"))
    assert output =~ "is older than Python 3.11"
    assert {output, 1} = make(dir, python: "no-such-python")
    assert output =~ "there is no no-such-python"
    # Also where the environment is there already, whatever it was made with.
    File.mkdir_p!(Path.join(dir, "bin"))
    File.touch!(Path.join(dir, "bin/python"))
    assert {_output, 1} = make(dir, python: "no-such-python")
  end

  test "has a PyTorch for the CPU only from an index that has one", %{dir: dir} do
    unless System.find_executable("uv") do
      capture_io(fn ->
        assert_raise SetupError, ~r/name the index of PyTorch's CPU builds in :torch_index/, fn ->
          CustomLoss.setup!(dir: dir, python: real_python(), torch: :cpu)
        end
      end)

      refute File.exists?(dir)
    end

    for torch <- [:cuda, "2.13.0", "", :nightly] do
      assert_raise ArgumentError,
                   ~r/expected :default, :cpu or a version such as "==2.13.0"/,
                   fn ->
                     CustomLoss.setup!(torch: torch)
                   end
    end

    assert %{torch: "==2.13.0", extras: ["sandbox"], dir: ".venv"} =
             Options.setup!(torch: "==2.13.0", extras: ["sandbox"])
  end
end
