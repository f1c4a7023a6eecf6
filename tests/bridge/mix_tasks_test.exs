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
      assert output =~ "torch"
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

    test "knows its options" do
      assert {output, 1} = mix(["tinkex.custom_loss.doctor", "--lod", "x"])
      assert output =~ "--lod: there is no such option"
    end
  end

  test "terms lists built-in and loaded terms with their parameters" do
    {output, status} =
      mix([
        "tinkex.custom_loss.terms",
        "--python",
        python(),
        "--load",
        fixture("tinkex_terms.py")
      ])

    assert status == 0, output

    assert output =~
             "l2  (builtin, scope token)\n    Squared"

    assert output =~ "tinkex_terms:masked  (loaded, scope batch)\n    (no docstring)"
  end

  @tag :tmp_dir
  test "setup makes an environment in which doctor finds all well", %{tmp_dir: tmp} do
    # What the package depends on is that of the Python which runs the tests, so that nothing is
    # downloaded; the package itself is built and installed.
    {paths, 0} =
      System.cmd(python(), ["-c", "import site; print(':'.join(site.getsitepackages()))"])

    env = [{"PYTHONPATH", String.trim(paths)}]
    dir = Path.join(tmp, "environment")
    installer = ["--", "--no-index", "--no-build-isolation", "--no-deps"]

    {output, status} =
      mix(["tinkex.custom_loss.setup", "--dir", dir, "--python", python()] ++ installer, env)

    assert status == 0, output
    assert output =~ "setup: making an environment in #{dir} with #{python()}"
    made = Path.join(dir, "bin/python")
    assert output =~ "setup: done; to check it: mix tinkex.custom_loss.doctor --python #{made}"

    assert [_] =
             Path.wildcard(Path.join(dir, "lib/python*/site-packages/tinker_custom_loss/port"))

    {output, status} = mix(["tinkex.custom_loss.doctor", "--python", made], env)
    assert status == 0, output

    # Again: nothing is made anew.
    {output, 0} = mix(["tinkex.custom_loss.setup", "--dir", dir] ++ installer, env)

    assert output =~ "setup: using the environment in #{dir}"
  end

  @tag :tmp_dir
  test "setup refuses a Python that is too old, or not there", %{tmp_dir: tmp} do
    setup = ["tinkex.custom_loss.setup", "--dir", Path.join(tmp, "environment"), "--python"]
    assert {output, 1} = mix(setup ++ [fixture("python_3_9")])
    assert output =~ "is older than Python 3.11"
    assert {output, 1} = mix(setup ++ ["no-such-python"])
    assert output =~ "there is no no-such-python"
    # Also where the environment is there already, whatever it was made with.
    File.mkdir_p!(Path.join(tmp, "environment/bin"))
    File.touch!(Path.join(tmp, "environment/bin/python"))
    assert {_output, 1} = mix(setup ++ ["no-such-python"])
  end
end
