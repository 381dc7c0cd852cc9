#!/usr/bin/perl
# A program whose state is in its memory and nowhere else: ten times a second it draws a random number and remembers it. Who connects to port 1010
# makes it draw one more, and is told its pid and all that it has drawn. The tour forks, rewinds and hibernates the machine that it runs in.
use strict;
use warnings;
use IO::Select;
use IO::Socket::INET;

open my $random, '<:raw', '/dev/urandom' or die "no random numbers: $!\n";
my @drawn;

sub draw {
    # Not `read`: that takes a buffer full in advance, and from a copied buffer every fork would draw the same.
    4 == sysread $random, my $bytes, 4 or die "no random number: $!\n";
    push @drawn, unpack 'H8', $bytes;
}

my $server = IO::Socket::INET->new(LocalAddr => '127.0.0.1', LocalPort => 1010, Listen => 16, ReuseAddr => 1)
    or die "cannot listen on port 1010: $!\n";
$| = 1;
$SIG{PIPE} = 'IGNORE';
print "drawing\n";
my $asked = IO::Select->new($server);
while (@drawn < 100_000) {    # for three hours, should nobody end it
    draw();
    next unless $asked->can_read(0.1);
    my $client = $server->accept or next;
    draw();
    print $client "$$ @drawn\n";
    close $client;
}
