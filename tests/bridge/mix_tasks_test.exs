defmodule Tinkex.CustomLoss.MixTasksTest do
  use ExUnit.Case, async: true

  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss.Pool.Python

  @root Path.expand("../..", __DIR__)
  @moduletag timeout: 300_000

  # In a BEAM of its own, since the environment decides.
  defp mix(args, env \\ []) do
    env = [{"MIX_ENV", "test"}] ++ env
    System.cmd("mix", args, cd: @root, env: env, stderr_to_stdout: true)
  end

  defp python do
    {:ok, python} = Python.find(nil)
    python
  end

  describe "doctor" do
    test "says that all is well, from Elixir to a worker" do
      {output, status} =
        mix([
          "tinkex.custom_loss.doctor",
          "--python",
          python(),
          "--load",
          fixture("tinkex_terms.py")
        ])

      assert status == 0, output
      refute output =~ "FAIL"
      assert output =~ ~r/^ok    Elixir #{Regex.escape(System.version())} on OTP/m
      assert output =~ "ok    the option :python names #{python()}\n"
      assert output =~ ~r/^ok    torch \d/m
      assert output =~ "tinkex_terms:masked"
      assert output =~ "ok    a round trip: the gradient of l2 is 2 · logprobs\n"
      assert output =~ "ok    a worker answers through its port\n"
    end

    test "says what to run where packages are missing" do
      # As /usr/bin/python3 would be on a machine where nothing was installed.
      {output, status} =
        mix(["tinkex.custom_loss.doctor"], [
          {"TINKEX_CUSTOM_LOSS_PYTHON", fixture("python_without_packages")}
        ])

      assert status == 1
      assert output =~ "FAIL  #{fixture("python_without_packages")} lacks "
      assert output =~ " -m pip install tinker-custom-loss cloudpickle msgspec "
      assert output =~ "run: mix tinkex.custom_loss.setup"
    end

    test "names a Python that is not there, and who named it" do
      {output, status} =
        mix(["tinkex.custom_loss.doctor"], [{"TINKEX_CUSTOM_LOSS_PYTHON", "/no/such/python"}])

      assert status == 1

      assert output =~
               "FAIL  there is no Python at /no/such/python, which TINKEX_CUSTOM_LOSS_PYTHON names"
    end

    test "fails where a module cannot be loaded" do
      {output, status} =
        mix(["tinkex.custom_loss.doctor", "--python", python(), "--load", "no_such_module"])

      assert status == 1
      assert output =~ ~s(FAIL  "no_such_module" cannot be loaded)
    end

    test "fails where a worker does not start, although nothing is missing" do
      env = [{"TINKEX_CUSTOM_LOSS_PYTHON", fixture("starts_no_worker.sh")}]
      {output, status} = mix(["tinkex.custom_loss.doctor"], env)
      assert status == 1
      assert output =~ ~r/^FAIL  .*starts_no_worker.sh exited with status 3 before it was ready/m
    end

    # As :telemetry does, which most projects have: it warns until it is started.
    @telemetry """
    defmodule :telemetry do
      use Application

      def start(_type, _args),
        do: Supervisor.start_link([], strategy: :one_for_one, name: __MODULE__)

      def execute(_event, _measurements, _metadata),
        do: IO.puts(if Process.whereis(__MODULE__), do: "executed", else: "telemetry is not started")
    end
    """

    @tag :tmp_dir
    test "makes telemetry warn of nothing", %{tmp_dir: tmp} do
      ebin = Path.join(tmp, "telemetry-1.0.0/ebin")
      File.mkdir_p!(ebin)
      source = Path.join(tmp, "telemetry.ex")
      File.write!(source, @telemetry)
      {_, 0} = System.cmd("elixirc", ["-o", ebin, source])

      app =
        {:application, :telemetry,
         vsn: ~c"1.0.0",
         modules: [:telemetry],
         registered: [],
         applications: [:kernel, :stdlib],
         mod: {:telemetry, []}}

      File.write!(Path.join(ebin, "telemetry.app"), :io_lib.format("~p.~n", [app]))
      # As a dependency is: what else ERL_LIBS names, Mix takes off the code path.
      given = ["do", "run", "--no-start", "-e", "Code.append_path(#{inspect(ebin)})", "+"]
      {output, status} = mix(given ++ ["tinkex.custom_loss.doctor", "--python", python()])
      assert status == 0, output
      assert output =~ "executed"
      refute output =~ "telemetry is not started"
    end

    test "knows its options" do
      assert {output, 1} = mix(["tinkex.custom_loss.doctor", "--lod", "x"])
      assert output =~ "--lod: there is no such option; to read of the options: mix help tinkex"

      assert {output, 1} = mix(["tinkex.custom_loss.doctor", "--load"])
      assert output =~ "--load: a value is missing"
    end
  end

  describe "terms" do
    setup do
      %{
        task: [
          "tinkex.custom_loss.terms",
          "--python",
          python(),
          "--load",
          fixture("tinkex_terms.py")
        ]
      }
    end

    test "lists built-in and loaded terms, a line each", %{task: task} do
      {output, status} = mix(task)
      assert status == 0, output
      assert output =~ ~r/^built in\n  nll +Negative log-likelihood: /m
      assert output =~ ~r/^tinkex_terms\n  tinkex_terms:/m
      assert output =~ ~r/^  tinkex_terms:masked +\(no docstring\)$/m
      refute output =~ "reduction ="
    end

    test "tells what those take that are named", %{task: task} do
      {output, status} = mix(task ++ ["l2", "tinkex_terms:masked"])
      assert status == 0, output
      assert output =~ ~r/^l2  \(builtin, scope token\)\n    weights: /m
      assert output =~ "    reduction = 'token_sum'  (token_sum | "
      assert output =~ "tinkex_terms:masked  (loaded, scope batch)\n"
      assert {output, 1} = mix(task ++ ["entropi"])
      assert output =~ ~r/there is no term "entropi"; of \d+, the nearest are: entropy, /
    end
  end
end
