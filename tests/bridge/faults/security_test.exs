defmodule Tinkex.CustomLoss.Faults.SecurityTest do
  # The claims of docs/security.md that the real worker can show.
  use ExUnit.Case, async: false

  import ExUnit.CaptureLog
  import Tinkex.CustomLoss.Bridge

  alias Tinkex.CustomLoss.Options
  alias Tinkex.CustomLoss.Pool.Python
  alias Tinkex.CustomLoss.Wire.{MessagePack, Protocol}

  @moduletag timeout: 120_000

  # What a BEAM may have open and secret; still open while the workers are started.
  setup_all do
    secret = Path.join(System.tmp_dir!(), "custom_loss_secret_#{System.pid()}")
    {:ok, file} = File.open(secret, [:write])
    {:ok, socket} = :gen_tcp.listen(0, [])
    System.put_env("INHERITED", "from the BEAM")
    System.put_env("REMOVED", "from the BEAM")

    on_exit(fn ->
      File.close(file)
      :gen_tcp.close(socket)
      File.rm!(secret)
      Enum.each(["INHERITED", "REMOVED"], &System.delete_env/1)
    end)

    {:ok, python} = Python.find(nil)
    env = [{"REAL_PYTHON", python}, {"GIVEN", "by :env"}, {"REMOVED", nil}]
    %{pool: start_terms!(["shows_what_it_has.py"], env: env)}
  end

  defp shown(pool, name) do
    capture_log([format: "$message\n"], fn ->
      assert square(pool, "shows_what_it_has:" <> name) == {:ok, 5.0}
    end)
  end

  test "a worker has its two pipes, and nothing else of the BEAM; a program of a term nothing at all",
       %{pool: pool} do
    log = shown(pool, "shows_descriptors")
    assert [_, own] = Regex.run(~r/"own": \{(.*?)\}/, log)

    # 0 to 2 are /dev/null and standard error (here dropped), 3 and 4 what was moved to the end;
    # between them the files that it shares, what epoll(7) needs, and modules that are being imported.
    assert own =~ ~r|^("[0-4]": "/dev/null", ){5}|
    assert own =~ ~r|, "100": "pipe", "101": "pipe"$|

    assert own |> String.split(~s("/memfd")) |> length() == 5
    refute own =~ "custom_loss_secret"
    refute own =~ "socket"
    refute own =~ "/dev/shm"
    # The last one is that of the listing.
    assert log =~ ~r/^program: 0 1 2 3$/m
  end

  test "the environment is the BEAM's, changed by :env", %{pool: pool} do
    log = shown(pool, "shows_environment")
    assert log =~ ~s("GIVEN": "by :env")
    assert log =~ ~s("INHERITED": "from the BEAM")
    assert log =~ ~s("REMOVED": null)
  end

  test "nothing that a message names is imported, by neither side" do
    config = Options.start!(load: [fixture("shows_what_it_has.py")])
    {:ok, port, os_pid} = Python.open(config, Python.worker_args(config))
    assert {:ready, _} = next(port)

    for {name, id} <-
          Enum.with_index(["antigravity:fly", "os:system", "builtins:eval", "l2.__class__"]) do
      Port.command(port, request(id, name))
      assert {:error, ^id, %{kind: :request, message: message}} = next(port)
      assert message =~ "there is no term"
    end

    Port.command(port, request(9, "shows_what_it_has:shows_modules"))
    assert {:log, %{message: "antigravity imported: False"}} = next(port, :log)
    Port.close(port)
    assert_gone(os_pid)
  end

  test "a message makes no atom" do
    for n <- 1..10, do: Protocol.decode(unknown(n))
    before = :erlang.system_info(:atom_count)
    for n <- 11..1_000, do: Protocol.decode(unknown(n))
    assert :erlang.system_info(:atom_count) == before
  end

  defp unknown(n) do
    key = "never_heard_of_#{n}"

    %{"op" => key, key => key, "level" => key, "error" => %{"kind" => key}}
    |> MessagePack.encode()
    |> IO.iodata_to_binary()
  end

  defp request(id, name) do
    Protocol.encode_compute(%{
      id: id,
      logprobs: Tinkex.CustomLoss.Wire.Tensor.logprobs([[-1.0, -2.0]]),
      regularizers: [%{name: "term", fn: name, weight: 1.0}]
    })
  end

  defp next(port, wanted \\ nil) do
    assert_receive {^port, {:data, frame}}, 60_000

    case Protocol.decode(frame) do
      {:log, _record} when wanted != :log -> next(port)
      message -> message
    end
  end
end
